"""Heads and batch entries without visible pairs give 0, LSE -inf and gradient 0, also in memory with old data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.runtime.api.compiled import Backend

RELATIONS = {
    "one head of two": "0 < head",
    "causal in one head": "head == 1 and k <= q",
    "no head": "head == 5 and k <= q",
    "one batch entry": "batch == 1",
    "one row of one head": "head == 1 and q == 1",
}


def results_and_grads(relation: str, backend: Backend, tensors: list[Tensor]) -> list[Tensor]:
    """Return the results and gradients of a relation."""
    attend = compile_attention(f"pattern some\n    align start\n    visible {relation}\n", backend=backend)
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, lse = attend(*leaves, return_lse=True)
    total = out.sum() + lse[lse != -math.inf].sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_rows_without_keys_are_written(relation: str, batch: int, heads: tuple[int, int]) -> None:
    tensors = [torch.randn(batch, h, 5, 8) for h in (heads[0], heads[1], heads[1])]
    for result, expected in zip(
        results_and_grads(relation, "cpu", tensors), results_and_grads(relation, "reference", tensors), strict=True
    ):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_unset_memory_is_nan() -> None:
    """The fixture of this folder works: a read of unset memory would be noticed."""
    like = torch.ones(3)
    for unset in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (1,))):
        assert unset.isnan().all()
