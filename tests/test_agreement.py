"""Every level agrees with its predecessor over drawn programs: evaluator, mask and reference, cpu executor."""

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
from attnc.runtime.api.attention import Attention
from attnc.runtime.verifying.accuracy import Probe, Run, compare
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.evaluate import Evaluator
from programs import Program, Shape, programs
from tiers import examples

Triple = tuple[Tensor, Tensor, Tensor]


def compiled(program: Program) -> Attention:
    given_: dict[str, Any] = dict(program.parameters)
    return compile_attention(program.source, **given_)


def inputs_of(program: Program) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in program.inputs.items()}


def masks_of(attention: Attention, program: Program) -> Tensor:
    """Return `Attention.mask` for every batch entry and head: (batch, heads, queries, keys)."""
    s = program.shape
    masks = []
    for head in range(s.heads):
        mask = attention.mask(s.n_q, s.n_k, head=head, heads=s.heads, kv_heads=s.kv_heads, **inputs_of(program))
        masks.append(mask.expand(s.batch, s.n_q, s.n_k))
    return torch.stack(masks, 1)


# --- visible pairs ----------------------------------------------------------------------------------------------------


def evaluated(attention: Attention, program: Program) -> Tensor:
    """Return the relation by the evaluator; discard the example if the relation has no value."""
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
    """Return the weights that an executor gives each key: its output for values that are unit vectors."""
    s = program.shape
    q = torch.zeros(s.batch, s.heads, s.n_q, 8, dtype=torch.float64)
    k = torch.zeros(s.batch, s.kv_heads, s.n_k, 8, dtype=torch.float64)
    v = torch.eye(s.n_k, dtype=torch.float64).expand(s.batch, s.kv_heads, s.n_k, s.n_k)
    call = attention if backend == "cpu" else attention.reference
    return cast("Tensor", call(q, k, v, **inputs_of(program)))


@settings(max_examples=examples(70))
@given(programs(longest=14, elements=1500))
def test_visible_pairs(program: Program) -> None:
    """Evaluator = mask = reference = cpu executor."""
    attention = compiled(program)
    wanted = evaluated(attention, program)
    assert torch.equal(masks_of(attention, program), wanted)
    for backend in ("reference", "cpu"):
        assert torch.equal(weights_of(attention, program, backend) > 0, wanted), backend


# --- numbers ---------------------------------------------------------------------------------------------------------


LAYOUTS = ("contiguous", "tokens before heads", "sliced", "expanded", "width major")


def arranged(x: Tensor, layout: str) -> Tensor:
    """Return the values in other strides; `expanded` has other values."""
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
    """Draw q, k and v with drawn head dimensions and strides, from a drawn seed."""
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
    q, k, v = inputs
    more = inputs_of(program)
    probe = Probe(q, k, v, mask, torch.randn(*q.shape[:3], v.shape[-1]).to(dtype), torch.randn(q.shape[:3]))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, return_lse=True, **more)

    got = gradients(ours, probe)
    check_nothing_seen(got, mask, program.shape)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype, dtype]
    assert all(torch.equal(x, y) for x, y in zip(got, gradients(ours, probe), strict=True)), (
        "a repeated call gives other bits"
    )
    assert [error for error in compare(ours, probe) if not error.agrees] == []


def gradients(run: Run, probe: Probe) -> list[Tensor]:
    """Return out, lse, dq, dk and dv of a run, in its own dtype and on the inputs' own strides."""
    leaves = [x.detach().requires_grad_() for x in (probe.q, probe.k, probe.v)]
    outputs = run(*leaves)
    grads = torch.autograd.grad(outputs, leaves, (probe.grad_out, probe.grad_lse), materialize_grads=True)
    return [*(x.detach() for x in outputs), *grads]


def check_nothing_seen(got: list[Tensor], mask: Tensor, shape: Shape) -> None:
    """Check that rows without visible keys, and keys that no query sees, are exactly zero."""
    out, lse, dq, dk, dv = got
    seeing = mask.any(-1)
    assert torch.equal(lse == -math.inf, ~seeing)
    assert not out[~seeing].any()
    assert not dq[~seeing].any()
    seen = mask.any(-2).reshape(shape.batch, shape.kv_heads, -1, shape.n_k).any(2)
    assert not dk[~seen].any()
    assert not dv[~seen].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=examples(16))
@given(st.data())
def test_numbers(dtype: torch.dtype, data: st.DataObject) -> None:
    program = data.draw(programs(longest=160, elements=1 << 17))
    check_numbers(program, data.draw(tensors(program.shape, dtype)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=examples(5))
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
def test_promised_shapes(n: int, heads: int, kv_heads: int, dk: int, dv: int, dtype: torch.dtype) -> None:
    """The shapes that the project promises agree with the reference."""
    shape = Shape(2 if n < 1000 else 1, heads, kv_heads, n, n)
    reach = [i % 3 for i in range(heads)]
    doc = np.sort(np.random.default_rng(n).integers(0, 5, (shape.batch, n)), axis=-1)
    program = Program(LONG.format(reach=", ".join(map(str, reach))), shape, {}, {"doc": doc})
    q = torch.randn(shape.batch, heads, n, dk).to(dtype)
    k, v = (torch.randn(shape.batch, kv_heads, n, d).to(dtype) for d in (dk, dv))
    check_numbers(program, (q, k, v), dtype)
