"""Selections in calls: new selections at every step without a new plan, sequences, caches, masks, `strict`."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attnc import ArgumentError, Attention, UnsupportedError, compile_attention
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.executors.selections.call_selections import CallSelections
from attnc.runtime.planning.plans import PLANNING
from attnc.spec.meaning.evaluate import Evaluator

pytestmark = pytest.mark.usefixtures("gathered")

Case = tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]

STEPS: list[Case] = [
    ("moba", {"block": 8, "topk": 3}, {}),
    ("native_sparse", {"block": 8, "topk": 4, "window": 10}, {"gate": (1, 96, 4, 3)}),
    ("dynamic_mask", {"keys_kept": 9}, {"bias": (1, 2, 96)}),
    ("minference_blocks", {"block": 8, "topk": 3}, {}),
    ("deepseek_sparse", {"topk": 9}, {"iq": (1, 96, 2, 4), "ik": (1, 96, 4), "w": (1, 96, 2)}),
]

STAGES: Case = (
    "hip",
    {"stages": [8, 4], "kept": [24, 8], "strides": [2, 1], "rows": 8, "sinks": 3, "window": 8},
    {},
)


def draw_qkv(n: int = 96, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q = torch.randn(1, heads, n, 8, dtype=dtype)
    return [q, *(torch.randn(1, kv_heads, n, 8, dtype=dtype) for _ in range(2))]


def inputs_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {name: torch.rand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "params", "shapes"), STEPS, ids=lambda x: x if isinstance(x, str) else "")
def test_fifty_steps_reuse_one_plan(
    name: str, params: dict[str, Any], shapes: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    """A training step plans once for its sizes; later steps select anew and plan nothing."""
    attend = compile_attention(name, **params)

    def step() -> Tensor:
        leaves = [x.requires_grad_() for x in draw_qkv(40, 2, 1)]  # few tokens, as a profiler keeps every operation
        fewer = {96: 40, 4: 2, 2: 1} if name in ("native_sparse", "dynamic_mask") else {96: 40}
        inputs = inputs_of({key: tuple(fewer.get(n, n) for n in shape) for key, shape in shapes.items()})
        attend(*leaves, **inputs).sum().backward()
        with torch.no_grad():
            return next(iter(attend.chosen(*leaves, **inputs).values()))

    with profile(activities=[ProfilerActivity.CPU]) as first_step:
        first_selection = step()
    selections = []
    with profile(activities=[ProfilerActivity.CPU]) as later_steps:
        for _ in range(50):
            selections.append(step())
    assert PLANNING in trace(first_step, tmp_path)
    assert PLANNING not in trace(later_steps, tmp_path)
    assert len({x.numpy().tobytes() for x in [first_selection, *selections]}) > 40, "the steps chose alike"


SEER: Case = ("seer", {"block": 8}, {"gq": (1, 4, 12, 4), "gk": (1, 4, 12, 4)})
VMOBA: Case = ("vmoba", {"frames": 2, "height": 6, "width": 8, "chunk": [1, 2, 2], "topk": 2}, {})


@pytest.mark.parametrize(
    ("name", "params", "shapes"), [*STEPS, SEER, VMOBA], ids=lambda x: x if isinstance(x, str) else ""
)
def test_selecting_reads_nothing_from_the_device(
    name: str, params: dict[str, Any], shapes: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors stand for a device's tensors: an operation for which the host would wait raises an error."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    pattern = compile_attention(name, **params).pattern
    with torch.device("meta"):
        q, k, v = draw_qkv()
        inputs = inputs_of(shapes)
        nodes = {node.name: torch.empty(1, 4, 96, 8) for node in pattern.nodes}
        sums = {f"{node.name}.lse": torch.empty(1, 4, 96) for node in pattern.nodes}
    tensors = {**inputs, **nodes, **sums}
    choices = CallSelections(pattern, CallArguments(q, k, v, inputs, tensors, 1.0), (q, k, v), tensors)
    choices.asking({selection.given for selection in pattern.selections})
    assert {result.device.type for result in choices.found.values()} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):
        bool(q[0, 0, 0, 0] > 0)


def trace(profiled: profile, folder: Path) -> str:
    """Return a profiler's trace as text; building the profiler's own event list takes longer than the steps."""
    profiled.export_chrome_trace(str(folder / "trace.json"))
    return (folder / "trace.json").read_text(encoding="utf-8")


def test_fifty_steps_compile_once() -> None:
    attend = compile_attention("moba", block=8, topk=3)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True)
    wanted = attend(*(tensors := draw_qkv()))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(*tensors), wanted)
        for _ in range(50):
            tensors = draw_qkv()
            torch.testing.assert_close(compiled(*tensors), attend(*tensors))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "params", "shapes"), [*STEPS[:2], STAGES], ids=lambda x: x if isinstance(x, str) else ""
)
def test_each_sequence_selects_separately(
    name: str, params: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    attend = compile_attention(name, **params)
    q, k, v = (x.requires_grad_() for x in draw_qkv(dtype=torch.float64))
    inputs = inputs_of(shapes)
    cuts = [0, 0, 31, 95, 96]
    by_token = {name: shape.index(96) for name, shape in shapes.items()}
    runs: list[Any] = [attend, attend.reference]
    for run in runs:
        out = run(q, k, v, cu_seqlens=torch.tensor(cuts), **inputs)
        parts = []
        for a, b in pairwise(cuts):
            sequence_inputs = {name: x.narrow(by_token[name], a, b - a) for name, x in inputs.items()}
            parts += [run(*(x[:, :, a:b] for x in (q, k, v)), **sequence_inputs)] if a < b else []
        torch.testing.assert_close(out, torch.cat(parts, 2))
        grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, torch.cat(parts, 2))]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


DOCUMENTS = """pattern in_documents(block: int = 4, topk: int = 2)
    input   doc: int[{dims}]
    documents doc
    align   end
    select chosen
        over   b = k // block
        score  dot(q, mean(b.k))
        from   b.end <= q
        keep   rank < topk
        always q in b
    visible k in chosen and k <= q and doc[q] >= 0
"""


@pytest.mark.parametrize("dims", ["batch, token", "token"])
def test_each_document_selects_separately(dims: str) -> None:
    attend = compile_attention(DOCUMENTS.format(dims=dims))
    q, k, v = (torch.randn(2, h, 40, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    rows = [[0] * 13 + [3] * 27, [5] * 40] if dims != "token" else [[0] * 13 + [3] * 27] * 2
    doc = torch.tensor(rows)
    ids = doc if dims != "token" else doc[0]
    runs: list[Any] = [attend, attend.reference]
    for run in runs:
        out = run(q, k, v, doc=ids)
        for i, row in enumerate(rows):
            cuts = [0, 13, 40] if len(set(row)) > 1 else [0, 40]
            for a, b in pairwise(cuts):
                document_tensors = [x[i : i + 1, :, a:b] for x in (q, k, v)]
                alone = run(*document_tensors, doc=doc[i : i + 1, a:b] if dims != "token" else doc[i, a:b])
                torch.testing.assert_close(out[i : i + 1, :, a:b], alone)
        torch.testing.assert_close(run(q[:, :, -9:], k, v, doc=ids), out[:, :, -9:])
        (grad,) = torch.autograd.grad(out[0, :, 20].sum(), k)
        assert bool((grad[0, :, :13] == 0).all())
        assert bool((grad[1] == 0).all())
    with pytest.raises(UnsupportedError, match="within documents are not supported"):
        attend.chosen(q, k, v, doc=ids)


@pytest.mark.parametrize(("name", "params", "shapes"), [*STEPS, STAGES], ids=lambda x: x if isinstance(x, str) else "")
def test_decode_selects_as_a_call_does(name: str, params: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    attend = compile_attention(name, **params)
    q, k, v = draw_qkv()
    inputs = inputs_of(shapes)
    if name in ("minference_blocks", "hip"):  # a selection for several queries, which a cache does not hold
        with pytest.raises(UnsupportedError, match="a cache of keys is not enough"):
            attend.decode(q[:, :, -1:], k, v, kv_len=96)
        return
    expected = attend(q, k, v, **inputs)
    more = [torch.cat([x, torch.randn(1, 2, 20, 8)], 2) for x in (k, v)]
    for count in (1, 3):
        last = {key: x[:, -count:] if key in ("gate", "iq", "w") else x for key, x in inputs.items()}
        out = attend.decode(q[:, :, -count:], *more, kv_len=96, **last)
        torch.testing.assert_close(out, expected[:, :, -count:], rtol=1e-5, atol=1e-5)
        out = attend.prefill(q[:, :, -count:], *more, kv_len=96, **last)
        torch.testing.assert_close(out, expected[:, :, -count:], rtol=1e-5, atol=1e-5)


def test_a_mask_needs_vectors() -> None:
    attend = compile_attention("moba", block=8, topk=2)
    q, k, v = draw_qkv(20)
    with pytest.raises(ArgumentError, match=r"the selection `chosen` of `moba` depends on content; pass `q` and `k`"):
        attend.mask(20)
    with pytest.raises(ArgumentError, match="q has 20 and k 20 tokens, not 21 and 21"):
        attend.mask(21, q=q, k=k)
    with pytest.raises(ArgumentError, match="there are 4 heads"):
        attend.mask(20, q=q, k=k, head=4)
    visible = torch.stack([attend.mask(20, q=q, k=k, head=h)[0] for h in range(4)])
    score = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(attend(q, k, v), score.softmax(-1) @ v.repeat_interleave(2, 1))
    with pytest.raises(ArgumentError, match="has no selection"):
        compile_attention("causal").chosen(q, k, v)


def test_strict_refuses_a_selection_of_every_block() -> None:
    attend = compile_attention("moba", block=8, topk=5, strict=True)
    q, k, v = draw_qkv(30)
    with pytest.raises(ArgumentError, match=r"keeps 4 blocks, but there are only [34]") as caught:
        attend(*draw_qkv(24))
    assert "use a smaller number or more tokens" in str(caught.value)
    assert attend(*draw_qkv(40)).shape == (1, 4, 40, 8)
    assert compile_attention("moba", block=8, topk=5)(q, k, v).shape == (1, 4, 30, 8)


def test_plans_state_what_may_be_selected() -> None:
    plan = compile_attention("moba", block=64, topk=3).plan(1024, heads=4)
    assert plan.schedule == "gathered queries"
    assert any("each query selects at most 2 blocks of `chosen`" in reason for reason in plan.reasons)
    branches = dict(compile_attention("native_sparse").plan(1024).branches)
    assert {name: branch.schedule for name, branch in branches.items()}["fine"] == "gathered queries"
    assert compile_attention("dynamic_mask").plan(256).schedule == "chosen tiles"


# --- the language, each clause against the evaluator ------------------------------------------------------------------

TEXTS: dict[str, str] = {
    "mass": """
    select chosen
        over   b = k // 4
        score  softmax(dot(q, mean(b.k)))
        keep   mass < 0.6
    visible k in chosen""",
    "a threshold relative to the best": """
    select chosen
        over   b = k // 4
        score  dot(q, max(b.k))
        keep   score >= max(score for b) - 1
    visible k in chosen""",
    "not, and at least": """
    select chosen
        over   b = k // 4
        score  softmax(dot(q, mean(b.k)))
        from   b.start <= q
        keep   not (rank >= 3) and (mass < 0.5 or rank < 1)
    visible k in chosen and k <= q""",
    "what was not chosen": """
    select worst
        score  -dot(q, k)
        from   k <= q
        keep   rank < 3
    visible k not in worst and k <= q""",
    "numbers that cover keys": """
    select spans
        over   n in 0 .. 5
        covers 3 * n <= k < 3 * n + 5
        score  dot(q, k[3 * n])
        from   3 * n <= q
        keep   rank < 2
    visible k in spans and k <= q""",
    "numbers that cover nothing": """
    input  weight: real[batch, query, 4]
    select on
        over   n in 0 .. 4
        score  weight[q, n]
        keep   rank < 2
    branch at[n in 0 .. 4]
        visible abs(q - k) <= 2 * n
    combine sum((1 if n in on else 0) * at[n] for n in 0 .. 4)""",
    "by a head, asked of queries and keys": """
    select kept
        per    head
        score  dot(k, k)
        keep   rank < keys - 5
    visible q in kept and k in kept""",
    "by a batch entry": """
    select kept
        per    batch
        score  sum(dot(k, k) for head)
        keep   rank < 7
    visible k in kept""",
    "pairs": """
    select chosen
        per    head
        over   q, b = k // 3
        score  dot(q, mean(b.k))
        keep   rank < 2 * queries
        always q in b
    visible k in chosen""",
    "units of queries, shared by a group": """
    select chosen
        per    a = q // 4
        over   b = k // 4
        score  sum(dot(mean(a.q), mean(b.k)) for head in group)
        from   b <= a
        keep   rank < 2
        always b == a
    visible k in chosen and k <= q""",
    "a choice from a choice": """
    select first
        over   b = k // 6
        score  dot(q, mean(b.k))
        keep   rank < 2
    select second
        over   c = k // 2
        score  dot(q, mean(c.k))
        from   c in first
        keep   rank < first.size + 1
    visible k in second""",
    "two choices": """
    select near
        over   b = k // 4
        score  dot(q, mean(b.k))
        from   b.end <= q
        keep   rank < 1
    select far
        score  dot(q, k)
        from   k <= q
        keep   rank < 2
    visible k in near or k in far or k == q""",
    "in a score": """
    select chosen
        score  dot(q, k)
        keep   rank < 4
    visible true
    score   scale * dot(q, k) + (2 if k in chosen else 0)""",
    "infinite and equal scores": """
    select chosen
        over   b = k // 3
        score  inf if b == 1 else -inf if b == 2 else 0
        keep   rank < 3
    visible k in chosen""",
    "by a branch": """
    branch pooled
        over    b = k // 4
        score   scale * dot(q, mean(b.k))
        value   mean(b.v)
    select chosen
        over   b = k // 4
        score  pooled.weight
        keep   rank < 2
    branch fine
        visible k in chosen
    combine pooled + fine""",
}


@pytest.mark.parametrize("name", TEXTS)
def test_each_clause_agrees_with_the_evaluator(name: str) -> None:
    attend = compile_attention(f"pattern p\n    align end{TEXTS[name]}\n")
    n = 17
    q, k, v = (x.requires_grad_() for x in draw_qkv(n, dtype=torch.float64))
    inputs: dict[str, Any] = {"weight": torch.randn(1, n, 4, dtype=torch.float64)} if "weight:" in TEXTS[name] else {}
    counts = {"queries": n, "keys": n, "heads": 4, "kv_heads": 2, "dk": 8, "dv": 8}
    oracle = Evaluator(attend.bound, inputs={key: x.tolist() for key, x in inputs.items()}, **counts)
    result, _ = oracle.attend(*(x.tolist() for x in (q, k, v)))
    wanted = torch.tensor(result, dtype=torch.float64)
    out, dense = attend(q, k, v, **inputs), attend.reference(q, k, v, **inputs)
    torch.testing.assert_close(dense, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(out)
    grads = [torch.autograd.grad((x * weights).sum(), (q, k, v), allow_unused=True) for x in (out, dense)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_fewer_queries_than_keys() -> None:
    """Units of query rows may begin before the first query of the call."""
    attend = compile_attention(f"pattern p\n    align end{TEXTS['units of queries, shared by a group']}\n")
    q, k, v = draw_qkv(17, dtype=torch.float64)
    q = q[:, :, -6:]
    oracle = Evaluator(attend.bound, queries=6, keys=17, heads=4, kv_heads=2, dk=8, dv=8)
    wanted = torch.tensor(oracle.attend(*(x.tolist() for x in (q, k, v)))[0], dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v), wanted)
    torch.testing.assert_close(attend.reference(q, k, v), wanted)


def test_half_precision_selects_in_single_precision() -> None:
    attend: Attention = compile_attention("moba", block=8, topk=3)
    q, k, v = (x.bfloat16() for x in draw_qkv())
    assert torch.equal(attend.chosen(q, k, v)["chosen"], attend.chosen(q.float(), k.float(), v.float())["chosen"])
    torch.testing.assert_close(attend(q, k, v).float(), attend(q.float(), k.float(), v.float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dims", ["token", "batch, token", "head, token"])
def test_a_bool_per_token_is_no_selection(dims: str) -> None:
    """A bool per token marks keys and is read like any other condition."""
    text = f"pattern marked()\n    input x: bool[{dims}]\n    visible k <= q and x[k]\n"
    attend = compile_attention(text)
    q, k, v = draw_qkv(n=40)
    x = torch.rand({"token": (40,), "batch, token": (1, 40), "head, token": (4, 40)}[dims]) < 0.7
    torch.testing.assert_close(attend(q, k, v, x=x), attend.reference(q, k, v, x=x))


@pytest.mark.parametrize("name", ["moba", "native_sparse"])
def test_threads_change_no_bit_of_the_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathered rows are divided evenly among the threads."""
    params: dict[str, Any] = {"block": 16, "topk": 3}
    attend = compile_attention(name, **params)
    q, k, v = draw_qkv(700)
    inputs: dict[str, Any] = {"gate": torch.rand(1, 700, 4, 3)} if name == "native_sparse" else {}
    grads = []
    outs = []
    for threads in (1, 2, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", partial(int, threads))
        vectors = [x.detach().requires_grad_() for x in (q, k, v)]
        outs.append(attend(*vectors, **inputs))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), vectors))
    assert all(torch.equal(out, outs[0]) for out in outs)
    for result in grads[1:]:
        for expected, actual in zip(grads[0], result, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
