"""The texts of Triton functions that recurrence kernels call."""

from __future__ import annotations

HELPERS = {
    "inverse_of_blocks": '''
@triton.jit
def inverse_of_blocks(lower, BLOCKS: tl.constexpr):
    """Of (1 + lower), strictly lower blocks of 16 × 16, by substitution: the products of Neumann's series lose all."""
    at = tl.arange(0, 16)
    row, column = at[None, :, None], at[None, None, :]
    found = tl.where((row == column) & (tl.arange(0, BLOCKS)[:, None, None] >= 0), 1.0, 0.0)
    for i in range(1, 16):
        own = tl.sum(tl.where(row == i, lower, 0.0), 1)
        taken = tl.sum(own[:, :, None] * found, 1)
        found = tl.where(row == i, found - taken[:, None, :], found)
    return found
''',
    "merged": '''
@triton.jit
def merged(found, below, PAIRS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of blocks twice as wide, from those of their halves and from what stands below the diagonal."""
    halves = tl.reshape(found, (PAIRS, 2, BLOCK, BLOCK))
    side = tl.arange(0, 2)[None, :, None, None]
    first = tl.sum(tl.where(side == 0, halves, 0.0), 1)
    second = tl.sum(tl.where(side == 1, halves, 0.0), 1)
    below = tl.dot(second, below, input_precision=PRECISION)
    below = -tl.dot(below, first, input_precision=PRECISION)
    top = tl.permute(tl.join(first, tl.zeros_like(first)), (0, 1, 3, 2))
    bottom = tl.permute(tl.join(below, second), (0, 1, 3, 2))
    top = tl.reshape(top, (PAIRS, BLOCK, 2 * BLOCK))
    bottom = tl.reshape(bottom, (PAIRS, BLOCK, 2 * BLOCK))
    return tl.reshape(tl.permute(tl.join(top, bottom), (0, 3, 1, 2)), (PAIRS, 2 * BLOCK, 2 * BLOCK))
''',
}
