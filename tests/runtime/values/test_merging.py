"""Partial results merged by their LSEs equal attention over all keys, gradients included."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, ArgumentTypeError, compile_attention, merge


def draw(n_q: int, n_k: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 4, n_q, 8), (2, 2, n_k, 8), (2, 2, n_k, 5)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("cuts", [[0, 20], [0, 7, 20], [0, 1, 2, 19, 20]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parts_of_the_keys(cuts: list[int], dtype: torch.dtype) -> None:
    full = compile_attention("full", backend="reference")
    q, k, v = draw(6, 20, dtype)
    expected = full(q, k, v, return_lse=True)
    ends = list(pairwise(cuts))
    parts = [full(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in ends]
    merged = merge(*parts)
    assert merged[0].dtype == dtype
    rounded = dtype == torch.bfloat16  # each partial result is rounded, to values below 4
    torch.testing.assert_close(merged, expected, rtol=2**-7 if rounded else None, atol=2**-7 if rounded else None)
    if dtype != torch.float64:
        return
    grads = torch.randn(expected[0].shape, dtype=dtype), torch.randn(expected[1].shape, dtype=dtype)
    wanted = torch.autograd.grad(expected, (q, k, v), grads)
    torch.testing.assert_close(torch.autograd.grad(merged, (q, k, v), grads), wanted)


def test_rows_without_keys_in_one_part_or_all() -> None:
    out, lse = torch.randn(2, 3, 4), torch.tensor([[0.5, -math.inf, -math.inf], [1.0, 2.0, 800.0]])
    out[lse == -math.inf] = 0
    other, of_other = torch.randn(2, 3, 4), torch.tensor([[0.1, 0.2, -math.inf], [-math.inf, 1.0, 799.0]])
    other[of_other == -math.inf] = 0
    merged, of_merged = merge((out, lse), (other, of_other))
    assert torch.equal(merged[0, 1], other[0, 1])
    assert torch.equal(merged[1, 0], out[1, 0])
    assert not merged[0, 2].any()
    assert of_merged[0, 2] == -math.inf
    assert of_merged[1, 2] == pytest.approx(800 + math.log1p(math.exp(-1)))
    lse.requires_grad_()
    (grad,) = torch.autograd.grad(merge((out, lse), (other, of_other))[0].sum(), lse)
    assert grad.isfinite().all()


def test_a_single_part_is_unchanged() -> None:
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    merged = merge((out, lse))
    torch.testing.assert_close(merged, (out, lse))


def test_invalid_partial_results_are_refused() -> None:
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ArgumentError, match="at least one part"):
        merge()
    with pytest.raises(ArgumentTypeError, match="pairs"):
        merge(out, lse)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="the parts of merge differ"):
        merge((out, lse), (out[:1], lse[:1]))
    with pytest.raises(ArgumentError, match="lse is out without its last dimension"):
        merge((out, out))
