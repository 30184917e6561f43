"""Branches with a state, against references written from the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnc import UnsupportedError, compile_attention
from attnc.runtime.call.call_errors import ArgumentTypeError
from attnc.runtime.texts.library import hybrid_names
from attnc.spec.errors import EvaluationError, SpecError
from attnc.spec.meaning.evaluate import Evaluator
from cases.hybrids import draw, ours


@pytest.mark.parametrize("name", hybrid_names())
def test_the_evaluator(name: str) -> None:
    tensors, inputs, numbers = draw(name, 9)
    attend, qkv, call_inputs = ours(name, tensors, inputs, numbers)
    with torch.no_grad():
        q, k, v = (x[:1] for x in qkv)
        evaluator_inputs: dict[str, Any] = {
            key: x[:1] if x.shape[0] == 2 and key not in ("A", "mix", "D") else x for key, x in call_inputs.items()
        }
        out = attend(q, k, v, scale=0.4, **evaluator_inputs)
    n = q.shape[2]
    sizes: dict[str, Any] = {"queries": n, "keys": n, "heads": 3, "kv_heads": 3, "dk": q.shape[3], "dv": 5}
    evaluator = Evaluator(attend.bound, inputs={key: x.tolist() for key, x in evaluator_inputs.items()}, **sizes)
    outputs, _ = evaluator.attend(*(x.tolist() for x in (q, k, v)), scale=0.4)
    torch.testing.assert_close(torch.tensor(outputs, dtype=torch.float64), out, rtol=1e-11, atol=1e-12)


def test_grouped_heads_documents_and_16_bits() -> None:
    attend = compile_attention("hybrid_window_linear", window=5)
    q, k, v = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.randn(1, 2, 30, 8)
    inputs: dict[str, Any] = {"g": -torch.rand(1, 30, 4), "gate": torch.rand(1, 30, 4)}
    whole = attend(q, k, v, cu_seqlens=torch.tensor([0, 11, 30]), **inputs)
    for s in (slice(0, 11), slice(11, 30)):
        document_inputs: dict[str, Any] = {name: x[:, s] for name, x in inputs.items()}
        torch.testing.assert_close(whole[:, :, s], attend(q[:, :, s], k[:, :, s], v[:, :, s], **document_inputs))
    narrow = attend(*(x.bfloat16() for x in (q, k, v)), **inputs)
    assert narrow.dtype == torch.bfloat16
    assert (narrow - attend(q, k, v, **inputs)).abs().max() < 0.1


FAMILY = """pattern p(n: int)
    visible_of
    branch at[b in {low} .. {high}]
        state S: [dk, dv]
        step  S = S / 2 ** b + outer(k, v)
        {more}
        read  q @ S
    combine {combine}
"""


def family(low: str = "1", high: str = "n", more: str = "", combine: str = "sum(at[b] for b in 1 .. n)") -> str:
    return FAMILY.format(low=low, high=high, more=more, combine=combine).replace("    visible_of\n", "    align end\n")


def test_a_family() -> None:
    attend = compile_attention(family(more="scan t if b % 2 == 0 else -t"), n=4)
    q, k, v = (torch.randn(2, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    parts = []
    for b in range(1, 4):
        order = "t" if b % 2 == 0 else "-t"
        lines = ["state S: [dk, dv]", f"scan {order}", f"step S = S / 2 ** {b} + outer(k, v)", "read q @ S"]
        parts.append(compile_attention("\n    ".join(["recurrence r", *lines]) + "\n")(q, k, v))
    torch.testing.assert_close(attend(q, k, v), sum(parts))
    torch.testing.assert_close(attend.reference(q, k, v), sum(parts))
    evaluator = Evaluator(attend.bound, queries=9, keys=9, heads=2, kv_heads=2, dk=4, dv=4)
    outputs, _ = evaluator.attend(*(x.tolist() for x in (q, k, v)))
    torch.testing.assert_close(torch.tensor(outputs, dtype=torch.float64), sum(parts))
    assert "branch at[2]\n    S[dk, dv]: a scalar decay" in attend.derivation()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (family(high="queries"), "A406"),
        (family(high="1"), "A703"),
        (family(combine="at"), "A206"),
        (family(combine="at[1].lse * v"), "A202"),
    ],
)
def test_mistakes_in_a_family(text: str, code: str) -> None:
    with pytest.raises(SpecError) as caught:
        compile_attention(text, n=4)
    assert code in {d.code for d in caught.value.diagnostics}
    assert all(d.help for d in caught.value.diagnostics)


def test_reading_a_missing_member() -> None:
    attend = compile_attention(family(combine="at[n]"), n=4)
    q = torch.randn(1, 1, 3, 4)
    for call in (attend, attend.reference):
        with pytest.raises(EvaluationError, match="is read at 3"):
            call(q, q, q)


def test_log_linear_has_levels_for_its_tokens() -> None:
    attend = compile_attention("log_linear", levels=3)
    q = torch.randn(1, 1, 9, 4)
    with pytest.raises(SpecError, match="A805"):
        attend(q, q, q, g=torch.zeros(1, 9, 1), level=torch.ones(1, 9, 1, 4))


def test_properties_and_refused_calls_of_a_hybrid() -> None:
    attend = compile_attention("hybrid_window_linear", window=5)
    assert not attend.is_recurrence
    assert not attend.has_mask
    plan = attend.plan(64, heads=2)
    assert plan.schedule == "branches"
    assert "before them the state of `far`, chunk by chunk" in plan.reasons
    q = torch.randn(1, 1, 4, 8)
    calls: list[Callable[[], object]] = [
        lambda: attend.mask(8),
        lambda: attend.simulate(64, device="cpu"),
        lambda: attend.simulate(1, 64, stage="decode"),
        attend.growth,
    ]
    for call in calls:
        with pytest.raises(UnsupportedError, match="has a branch with a state, `far`"):
            call()
    with pytest.raises(ArgumentTypeError, match="pass `state`"):
        attend.decode(q[:, :, :1], q, q, kv_len=4)
    assert compile_attention("lingen_ma", frames=1, height=2, width=2).is_recurrence
    with pytest.raises(UnsupportedError, match="strict"):
        compile_attention(
            "pattern p\n    branch a\n        visible q >= k\n    branch b\n        state S: [dv]\n"
            "        step S = tanh(S + v)\n        read S\n    combine a + b\n",
            strict=True,
        )
