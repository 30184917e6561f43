"""Scores and extra logits: evaluator, reference and cpu agree, gradients too; errors; hidden pairs have no effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.runtime.api.attention import Attention
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.executors.cpu import row_blocks
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.evaluate import Evaluator

HEADS, KV_HEADS, WIDTH = 4, 2, 6

SPECS = {
    "bias by head": "    visible k <= q\n    score scale * dot(q, k) + 2 ** (-8 * (head + 1) / heads) * (k - q)\n",
    "capped": "    visible 0 <= q - k < 9\n    score 5 * tanh(scale * dot(q, k) / 5)\n",
    "gates": "    input f: log_decay[batch, token, head]\n    visible k <= q\n"
    "    score scale * dot(q, k) + sum(f[j] for j in k + 1 .. q + 1)\n",
    "distances": "    learned near: real[head, 2 * 4 + 1, dk]\n    visible abs(q - k) <= 4\n"
    "    score scale * (dot(q, k) + dot(q, near[k - q + 4]))\n",
    "cosine": "    input bias: real[batch, key]\n    visible abs(q - k) < 12\n"
    "    score 4 * dot(normalised(q), rms(k)) + (bias[k] * (q - k) if q > k else softplus(bias[k]))\n",
    "keys alone": "    input bias: real[kv_head, key]\n"
    "    score scale * dot(q, k) - 3 * bias[k] + logaddexp(bias[k], 0)\n",
    "queries": "    input gate: unit[batch, query, head]\n    visible k <= q\n    score gate[q] * scale * dot(q, k)\n",
    "largest": "    input bias: real[token]\n    visible k <= q\n"
    "    score scale * dot(q, k) + max(bias[j] for j in k .. min(k + 3, q + 1)) - min(bias[k], 1)\n",
    "sinks": "    learned sink: real[head, sinks]\n    visible k < q\n    weights softmax(extra = sink)\n",
    "sink of the query": "    input sink: real[batch, query]\n    visible 0 <= q - k < 5\n"
    "    score dot(q, k) / 4\n    weights softmax(score, extra = sink[q])\n",
    "documents": "    input doc: int[token]\n    input bias: real[token]\n    documents doc\n    visible k <= q\n"
    "    score scale * dot(q, k) + bias[k] / (q + 1)\n",
}


def attention(name: str, **options: Any) -> Attention:
    return compile_attention(f"pattern p\n    align end\n{SPECS[name]}", **options)


def operands(attend: Attention, n_q: int, n_k: int, dtype: torch.dtype, batch: int = 2) -> dict[str, Tensor]:
    """Return q, k, v and the inputs; floating-point tensors require gradients."""
    generator = torch.Generator().manual_seed(n_q * 1000 + n_k)
    sizes = {"batch": batch, "head": HEADS, "kv_head": KV_HEADS, "query": n_q, "key": n_k, "token": n_k}
    sizes |= {"dk": WIDTH, "sinks": 3}
    shapes = {"q": (batch, HEADS, n_q, WIDTH), "k": (batch, KV_HEADS, n_k, WIDTH), "v": (batch, KV_HEADS, n_k, 5)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    for tensor in attend.bound.program.inputs:
        shape = [sizes.get(str(d), 9) for d in tensor.type.dims]  # 9 is the length of `near`
        if tensor.type.kind == "int":
            tensors[tensor.name] = torch.arange(n_k) // 7
            continue
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        refined = {"log_decay": -value.abs(), "unit": value.sigmoid()}
        tensors[tensor.name] = refined.get(tensor.type.refinement or "", value)
    return {name: x.to(dtype).requires_grad_() if x.is_floating_point() else x for name, x in tensors.items()}


def results(call: Any, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return out, LSE, and the gradients of a loss on both."""
    out, lse = call(tensors["q"], tensors["k"], tensors["v"], return_lse=True, **_inputs(tensors))
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
    loss = (
        loss + (torch.where(lse.isinf(), 0, lse) * torch.randn(lse.shape, generator=generator, dtype=lse.dtype)).sum()
    )
    leaves = [x for x in tensors.values() if x.requires_grad]
    return [out, lse, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def _inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("lengths", [(1, 1), (5, 5), (9, 9), (4, 9)])
def test_reference_agrees_with_the_evaluator(name: str, lengths: tuple[int, int]) -> None:
    n_q, n_k = lengths
    attend = attention(name)
    tensors = {key: x.detach() for key, x in operands(attend, n_q, n_k, torch.float64).items()}
    inputs = {key: x.tolist() for key, x in _inputs(tensors).items()}
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "dk": WIDTH, "dv": 5}
    oracle = Evaluator(attend.bound, queries=n_q, keys=n_k, inputs=inputs, **sizes)
    wanted = oracle.attend(tensors["q"].tolist(), tensors["k"].tolist(), tensors["v"].tolist())
    reference: Any = attend.reference
    result = reference(tensors["q"], tensors["k"], tensors["v"], return_lse=True, **_inputs(tensors))
    for a, b in zip(result, wanted, strict=True):
        torch.testing.assert_close(a, torch.tensor(b, dtype=torch.float64), rtol=1e-11, atol=1e-11)


@pytest.mark.threads
@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("lengths", [(1, 1), (2, 2), (37, 37), (150, 150), (13, 61)])
def test_cpu_agrees_with_the_reference(name: str, lengths: tuple[int, int]) -> None:
    """Compare output, LSE and every gradient, including rows without keys."""
    attend = attention(name)
    tensors = operands(attend, *lengths, torch.float64)
    for a, b in zip(results(attend, tensors), results(attend.reference, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.threads
@pytest.mark.parametrize("name", ["bias by head", "capped", "gates", "sinks"])
def test_small_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention(name)
    tensors = operands(attend, 150, 150, torch.float64)
    expected = results(attend, tensors)
    monkeypatch.setattr(row_blocks, "MOST_ROWS", 16)
    monkeypatch.setattr(row_blocks, "ELEMENTS", 1 << 10)
    for a, b in zip(results(attend, tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.threads
@pytest.mark.parametrize("name", ["bias by head", "sinks", "keys alone"])
def test_gradients_by_torchs_kernel(name: str) -> None:
    """If no input requires a gradient, torch's kernel computes the gradients of q, k and v."""
    attend = attention(name)
    tensors = {n: x if n in "qkv" else x.detach() for n, x in operands(attend, 70, 70, torch.float64).items()}
    for a, b in zip(results(attend, tensors), results(attend.reference, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.threads
@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_same_bits_again(name: str) -> None:
    attend = attention(name)
    tensors = operands(attend, 65, 65, torch.float32)
    for a, b in zip(results(attend, tensors), results(attend, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_gradcheck(name: str) -> None:
    attend: Any = attention(name)
    operands_of_call = operands(attend, 6, 6, torch.float64, batch=1)
    names = [n for n, x in operands_of_call.items() if x.requires_grad]
    fixed = {n: x for n, x in operands_of_call.items() if not x.requires_grad}

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        call_tensors = dict(zip(names, tensors, strict=True)) | fixed
        out, lse = attend(
            call_tensors["q"], call_tensors["k"], call_tensors["v"], return_lse=True, **_inputs(call_tensors)
        )
        return out, torch.where(lse.isinf(), 0, lse)

    assert torch.autograd.gradcheck(call, [operands_of_call[n] for n in names])


@pytest.mark.parametrize(("dims", "term"), [("4", "t[q - k]"), ("4, dk", "dot(q, t[q - k])")])
def test_an_index_out_of_range_at_a_visible_pair_raises(dims: str, term: str) -> None:
    attend = compile_attention(
        f"pattern p\n    input t: real[{dims}]\n    visible k <= q\n    score scale * dot(q, k) + {term}\n"
    )
    q = torch.randn(1, 1, 4, 8)
    table = torch.zeros(4) if dims == "4" else torch.zeros(4, 8)
    attend(q, q, q, t=table)
    longer = torch.randn(1, 1, 5, 8)
    with pytest.raises(EvaluationError, match="`t` is read at 4"):
        attend(longer, longer, longer, t=table)


def test_a_division_by_zero_at_a_visible_pair_raises() -> None:
    """Hidden pairs and the side of a condition that is not taken do not count, as in the evaluator."""
    q = torch.randn(1, 1, 5, 8)
    line = "pattern p\n    visible {}\n    score scale * dot(q, k) + {}\n"
    for backend in ("cpu", "reference"):
        fault = compile_attention(line.format("k <= q", "1 / (q - k)"), backend=backend)
        with pytest.raises(EvaluationError, match="division by zero"):
            fault(q, q, q)
        for visible, term in (("k < q", "1 / (q - k)"), ("k <= q", "(1 / (q - k) if q > k else 0)")):
            assert compile_attention(line.format(visible, term), backend=backend)(q, q, q).isfinite().all()


def test_undefined_values_at_hidden_pairs_do_not_spread() -> None:
    """log(0) at hidden pairs and in a branch that is not taken, and NaN in an entry that no visible pair reads."""
    attend = compile_attention(
        "pattern p\n    input t: real[token]\n    visible k < q\n"
        "    score scale * dot(q, k) + log(q - k) + (log(t[k]) if k > 0 else 0)\n"
    )
    tensors = {n: torch.rand(1, 1, 9, 4, dtype=torch.float64) for n in "qkv"} | {"t": torch.rand(9).double()}
    tensors["t"][0], tensors["t"][8] = 0, torch.nan
    tensors = {n: x.requires_grad_() for n, x in tensors.items()}
    for call in (attend, attend.reference):
        result = results(call, tensors)
        assert all(x.isfinite().all() for x in (result[0], *result[2:]))
        assert result[-1][0] == result[-1][8] == 0


def test_nan_vectors_at_hidden_pairs_do_not_spread() -> None:
    """NaN in table vectors that no visible pair reads, which lie between vectors that are read."""
    attend = compile_attention(
        "pattern p\n    learned t: real[head, span, dk]\n    visible k <= q and (q - k) % 2 == 0\n"
        "    score scale * dot(q, k) + dot(q, t[q - k])\n"
    )
    tensors = {n: torch.rand(1, 2, 9, 16, dtype=torch.float64) for n in ("q", "k", "v", "t")}
    tensors["t"][:, :, 1::2] = torch.nan
    tensors = {n: (x[0] if n == "t" else x).detach().requires_grad_() for n, x in tensors.items()}
    for result, wanted in zip(results(attend, tensors), results(attend.reference, tensors), strict=True):
        assert result.isfinite().all()
        torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-10)


def test_plans_state_how_scores_are_computed() -> None:
    assert "kernel's mask" in attention("bias by head").plan(64).reasons[0]
    assert "torch" in attention("capped").plan(64).reasons[0]
    assert "extra logits" in attention("sinks").plan(64).reasons[0]


def test_plans_do_not_depend_on_inputs_of_the_score() -> None:
    attend = attention("keys alone")
    assert attend.plan(33).visible == 33 * 33
    assert attend.relation_inputs == frozenset()


def test_missing_and_wrong_inputs() -> None:
    attend, q = attention("gates"), torch.randn(1, 2, 5, 8)
    with pytest.raises(ArgumentTypeError, match="needs the input `f`"):
        attend(q, q, q)
    with pytest.raises(ArgumentTypeError, match="must be real"):
        attend(q, q, q, f=torch.zeros(1, 5, 2, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="size 4 in dimension 1"):
        attend(q, q, q, f=torch.zeros(1, 4, 2))


# --- modules ---------------------------------------------------------------------------------------------------------


def test_module_learns() -> None:
    module: Any = compile_attention("gpt_oss", window=4).module(heads=2, dk=8, dv=8)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {"sink": (2,)}
    q = torch.randn(1, 2, 6, 8)
    out, lse = module(q, q, q, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (1, 2, 6)
    out.sum().backward()
    assert module.sink.grad is not None
    assert module.sink.grad.abs().sum() > 0
    again = compile_attention("gpt_oss", window=4).module(heads=2, dk=8, dv=8)
    again.load_state_dict(module.state_dict())
    assert "gpt_oss" in repr(again)


def test_module_sizes() -> None:
    attend = compile_attention("music_relative")
    module: Any = attend.module(heads=2, dk=4, dv=4, length=9)
    assert module.E.shape == (2, 9, 4)
    x = torch.randn(2, 7, 4)
    module = attend.module(heads=2, dk=4, dv=4, E=x)
    assert torch.equal(module.E, x)
    with pytest.raises(ArgumentError, match="pass its size, `length=…`"):
        attend.module(heads=2, dk=4, dv=4)
    with pytest.raises(ArgumentError, match=r"must be \(2, 7, 4\)"):
        attend.module(heads=2, dk=4, dv=4, E=torch.randn(3, 7, 4))
    with pytest.raises(ArgumentTypeError, match="learns no `F`"):
        attend.module(heads=2, dk=4, dv=4, F=x)
    with pytest.raises(ArgumentTypeError, match="a size must be an integer above 0"):
        attend.module(heads=2, dk=4, dv=4, length=0)
