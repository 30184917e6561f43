"""Every level agrees with the one before it, over drawn programs: evaluator, mask and reference, cpu executor."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnc import compile_attention
from attnc.runtime.attention import Attention
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.evaluate import Evaluator
from programs import Program, Shape, programs

Triple = tuple[Tensor, Tensor, Tensor]

UNITS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 4}
"""Units in the last place, of the largest true element, that are granted beyond twice the error of a dense run.

The dense run may be luckier than its dtype: where a row sees one key its weights are exact. In fp32 torch's flash
kernel takes its exponential from a polynomial good to 20 bits, 8 units, once forward and once backward. In half types
a result is rounded once more than the dense run's where pieces are merged (1 unit), and P is rounded before each
product (2).
"""


def compiled(program: Program) -> Attention:
    given_: dict[str, Any] = dict(program.parameters)
    return compile_attention(program.source, **given_)


def inputs_of(program: Program) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in program.inputs.items()}


def masks_of(attention: Attention, program: Program) -> Tensor:
    """`Attention.mask` for every batch entry and head: (batch, heads, queries, keys)."""
    s = program.shape
    masks = []
    for head in range(s.heads):
        mask = attention.mask(s.n_q, s.n_k, head=head, heads=s.heads, kv_heads=s.kv_heads, **inputs_of(program))
        masks.append(mask.expand(s.batch, s.n_q, s.n_k))
    return torch.stack(masks, 1)


# --- who sees whom ---------------------------------------------------------------------------------------------------


def evaluated(attention: Attention, program: Program) -> Tensor:
    """The relation by the evaluator. Where it has no value, neither has the example."""
    s = program.shape
    try:
        evaluator = Evaluator(
            attention.bound, queries=s.n_q, keys=s.n_k, heads=s.heads, kv_heads=s.kv_heads, inputs=program.inputs
        )
        masks = [[evaluator.mask(head=h, batch=b) for h in range(s.heads)] for b in range(s.batch)]
    except EvaluationError:
        assume(False)
        raise
    return torch.tensor(masks, dtype=torch.bool)


def weights_of(attention: Attention, program: Program, backend: str) -> Tensor:
    """The weights that an executor gives each key: its output for values that are unit vectors."""
    s = program.shape
    q = torch.zeros(s.batch, s.heads, s.n_q, 8, dtype=torch.float64)
    k = torch.zeros(s.batch, s.kv_heads, s.n_k, 8, dtype=torch.float64)
    v = torch.eye(s.n_k, dtype=torch.float64).expand(s.batch, s.kv_heads, s.n_k, s.n_k)
    call = attention if backend == "cpu" else attention.reference
    return cast("Tensor", call(q, k, v, **inputs_of(program)))


@settings(max_examples=70)
@given(programs(longest=14, elements=1500))
def test_who_sees_whom(program: Program) -> None:
    """Evaluator = mask = reference = cpu executor."""
    attention = compiled(program)
    wanted = evaluated(attention, program)
    assert torch.equal(masks_of(attention, program), wanted)
    for backend in ("reference", "cpu"):
        assert torch.equal(weights_of(attention, program, backend) > 0, wanted), backend


# --- numbers ---------------------------------------------------------------------------------------------------------


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain softmax attention in the dtype of its inputs; rows that see nothing are 0 and -inf, also for autograd."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seeing = mask.any(-1)
    score = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask & seeing[..., None], -math.inf)
    out = (score.softmax(-1) @ v).masked_fill(~seeing[..., None], 0)
    return out, score.logsumexp(-1).masked_fill(~seeing, -math.inf)


def gradients(outputs: tuple[Tensor, Tensor], leaves: Triple, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """out, lse, dq, dk, dv of a loss that reads out and lse."""
    given_ = [g.to(o.dtype) for o, g in zip(outputs, grads, strict=True)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, given_)]


LAYOUTS = ("contiguous", "tokens before heads", "sliced", "expanded", "width major")


def arranged(x: Tensor, layout: str) -> Tensor:
    """The same values (but for `expanded`) in other strides."""
    match layout:
        case "tokens before heads":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "sliced":
            wide = torch.full((x.shape[0] + 1, x.shape[1] + 1, 2 * x.shape[2], x.shape[3] + 5), math.nan, dtype=x.dtype)
            return wide[1:, 1:, ::2, 3:-2].copy_(x)
        case "expanded":
            return x[:, :1].expand_as(x)
        case "width major":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        case _:
            return x


@st.composite
def tensors(draw: st.DrawFn, shape: Shape, dtype: torch.dtype) -> Triple:
    """q, k and v of drawn head dimensions and strides, from a drawn seed."""
    torch.manual_seed(draw(st.integers(0, 9999)))
    widths = st.one_of(st.integers(8, 192), st.sampled_from([8, 16, 64, 128, 192]))
    dk, dv = draw(widths), draw(widths)
    if draw(st.booleans()):
        dv = dk
    s = shape
    sizes = ((s.batch, s.heads, s.n_q, dk), (s.batch, s.kv_heads, s.n_k, dk), (s.batch, s.kv_heads, s.n_k, dv))
    q, k, v = (arranged(torch.randn(size).to(dtype), draw(st.sampled_from(LAYOUTS))) for size in sizes)
    return q, k, v


def check_numbers(program: Program, inputs: Triple, dtype: torch.dtype) -> None:
    attention = compiled(program)
    try:
        mask = masks_of(attention, program)
    except EvaluationError:
        assume(False)
        raise
    q, _, v = inputs
    scale, more = q.shape[-1] ** -0.5, inputs_of(program)
    grads = torch.randn(*q.shape[:3], v.shape[-1]).to(dtype), torch.randn(q.shape[:3])

    def ours() -> list[Tensor]:
        a, b, c = (x.detach().requires_grad_() for x in inputs)
        outputs = attention(a, b, c, return_lse=True, **more)
        return gradients(outputs, (a, b, c), grads)

    def plain(kind: torch.dtype) -> list[Tensor]:
        a, b, c = (x.detach().to(kind).contiguous().requires_grad_() for x in inputs)
        return gradients(dense(a, b, c, mask, scale), (a, b, c), grads)

    got, true, rival = ours(), plain(torch.float64), plain(dtype)
    check_nothing_seen(got, mask, program.shape)
    floors = floors_of(true, inputs, grads[0], dtype)
    for (name, floor), x, y, z in zip(floors.items(), got, rival, true, strict=True):
        assert x.dtype == (torch.float32 if name == "lse" else dtype)
        finite = z.isfinite()
        assert x[finite].isfinite().all(), name
        error, fair = (largest((t.double() - z)[finite]) for t in (x, y))
        assert error <= 2 * fair + floor, (name, error, fair, floor)
    for x, y in zip(got, ours(), strict=True):
        assert torch.equal(x, y), "the same call gives other bits"
    reference = attention.reference(*inputs, return_lse=True, dtype=torch.float64, **more)
    for x, z in zip(reference, true, strict=False):
        torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-9)


def largest(x: Tensor) -> float:
    return x.double().abs().max().item() if x.numel() else 0.0


def floors_of(true: list[Tensor], inputs: Triple, grad_out: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Errors that are granted beyond twice those of the dense run; see UNITS.

    An lse near 0 is a sum of scores of size 1, so that its rounding is that of 1. dq and dk are made of differences
    dP − δ, of sums in fp32 that may be far larger than their difference: for a row of one key they cancel altogether,
    which the dense run does without error.
    """
    q, k, v = inputs
    sizes = {n: largest(z[z.isfinite()]) for n, z in zip(("out", "lse", "dq", "dk", "dv"), true, strict=True)}
    floors = {
        n: UNITS[dtype] * torch.finfo(dtype).eps * max(size, 1.0 if n == "lse" else 1e-3) for n, size in sizes.items()
    }
    norms = largest(grad_out.double().norm(dim=-1)) * largest(v.double().norm(dim=-1))
    cancelled = torch.finfo(torch.float32).eps * q.shape[-1] ** -0.5 * norms
    floors["dq"] += cancelled * largest(k)
    floors["dk"] += cancelled * largest(q)
    return floors


def check_nothing_seen(got: list[Tensor], mask: Tensor, shape: Shape) -> None:
    """Rows that see nothing and keys that nobody sees are exactly nothing."""
    out, lse, dq, dk, dv = got
    seeing = mask.any(-1)
    assert torch.equal(lse == -math.inf, ~seeing)
    assert not out[~seeing].any()
    assert not dq[~seeing].any()
    seen = mask.any(-2).reshape(shape.batch, shape.kv_heads, -1, shape.n_k).any(2)
    assert not dk[~seen].any()
    assert not dv[~seen].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=16)
@given(st.data())
def test_numbers(dtype: torch.dtype, data: st.DataObject) -> None:
    program = data.draw(programs(longest=160, elements=1 << 17))
    check_numbers(program, data.draw(tensors(program.shape, dtype)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=5)
@given(st.data())
def test_numbers_of_long_sequences(dtype: torch.dtype, data: st.DataObject) -> None:
    program = data.draw(programs(longest=1025, elements=1 << 20))
    check_numbers(program, data.draw(tensors(program.shape, dtype)), dtype)


LONG = """
pattern long(window: int = 100, reach: int[head] = [{reach}])
    align   end
    input   doc: int[batch, token]
    visible 0 <= q - k < window + reach  or  k <= q and k < 3
    visible doc[q] == doc[k] or q % 7 == 0
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "dk", "dv"),
    [(1025, 1, 1, 64, 64), (137, 12, 4, 192, 8), (129, 7, 7, 8, 192), (31, 5, 1, 72, 80), (1, 6, 3, 8, 8)],
)
def test_shapes_of_the_promise(n: int, heads: int, kv_heads: int, dk: int, dv: int, dtype: torch.dtype) -> None:
    """Those that are named in what must hold."""
    shape = Shape(2 if n < 1000 else 1, heads, kv_heads, n, n)
    reach = [i % 3 for i in range(heads)]
    doc = np.sort(np.random.default_rng(n).integers(0, 5, (shape.batch, n)), axis=-1)
    program = Program(LONG.format(reach=", ".join(map(str, reach))), shape, {}, {"doc": doc})
    q = torch.randn(shape.batch, heads, n, dk).to(dtype)
    k, v = (torch.randn(shape.batch, kv_heads, n, d).to(dtype) for d in (dk, dv))
    check_numbers(program, (q, k, v), dtype)
