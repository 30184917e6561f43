"""The inverse of unit lower triangular matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.runtime.executors.recurrent.levels import below, siblings

BASE = 16


def inverse(lower: Tensor) -> Tensor:
    """Compute (I + lower)⁻¹ of strictly lower triangles (n, L, L), L a power of two; reads only the strict triangle.

    Blocks of 16 rows are inverted by substitution, then pairs of blocks are merged: [[X, 0], [-Y A X, Y]]. The product
    (I + A)(I + A²)(I + A⁴)… is equal in exact arithmetic, but its intermediates grow like 3^16 where keys resemble one
    another, and fp32 then loses every digit of the result. (The UT transform of Joffrain et al. 2006, as used by Yang
    et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 3.2.)
    """
    n, length, _ = lower.shape
    block = min(BASE, length)
    unit = torch.eye(block, dtype=lower.dtype, device=lower.device)
    result = torch.zeros_like(lower, memory_format=torch.contiguous_format)
    _diagonal(result, block).copy_(
        torch.linalg.solve_triangular(
            _diagonal(lower, block), unit.expand(n, length // block, block, block), upper=False, unitriangular=True
        )
    )
    while block < length:
        first, second = siblings(result, block, 0, 0), siblings(result, block, 1, 1)
        below(result, block).copy_((second @ below(lower, block) @ first).neg_())
        block *= 2
    return result


def _diagonal(matrices: Tensor, block: int) -> Tensor:
    """View the blocks on the diagonal of (n, L, L) as (n, L / block, block, block)."""
    n, length, _ = matrices.shape
    chunk, down, right = matrices.stride()
    return matrices.as_strided(
        (n, length // block, block, block), (chunk, block * (down + right), down, right), matrices.storage_offset()
    )
