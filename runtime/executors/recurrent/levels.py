"""Sums of log decays over blocks of 1, 2, 4, … tokens, and the gradient of the decays through them.

A pair of tokens j < t of a chunk belongs to the level of the highest bit in which t and j differ: at this level t is in
an odd block and j in its even sibling, and the decay between them is the product of `rise` at t and `fall` at j. Every
factor is the exponential of a sum of terms ≤ 0 inside one block: nothing is subtracted, so nothing overflows, a log
decay of -inf is legal, and no digit is lost beside a strong decay. The levels are those of a Fenwick tree (Guo et al.
2025, "Log-Linear Attention", section 3); the split of the exponent between the operands of a matrix product is
secondary chunking (Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient Training", section
4.3).

Tensors are (n, L, F): n chunks, L tokens (a power of two), F channels or 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DecayLevel:
    """Blocks of `block` tokens; both factors are (n, L / (2 block), block, F).

    `rise`: exp of the sum from the start of an odd block to the token. `fall`: exp of the sum after the token to the
    end of an even block.
    """

    block: int
    rise: Tensor
    fall: Tensor

    def rises(self, exclusive: bool) -> Tensor:
        """Return `rise`, for an exclusive reader without the token's own decay."""
        return delayed(self.rise, 1) if exclusive else self.rise


@dataclass(frozen=True)
class BlockSums:
    """The levels of a chunk, and the decay from its start and to its end.

    `into` (n, L, F): exp of the sum from the chunk's start to the token; `out_of` (n, L, F): after the token to the
    end; `total` (n, 1, F).
    """

    levels: tuple[DecayLevel, ...]
    into: Tensor
    out_of: Tensor
    total: Tensor

    def enter(self, exclusive: bool) -> Tensor:
        """Return `into`, for an exclusive reader without the token's own decay."""
        return delayed(self.into, 1) if exclusive else self.into


@dataclass(frozen=True)
class SumAdjoints:
    """Adjoints of exponents: of `rise` and `fall` per level, smallest block first, and of `into`, `out_of`, `total`."""

    levels: Sequence[tuple[Tensor, Tensor]]
    into: Tensor
    out_of: Tensor
    total: Tensor


def block_sums(gate: Tensor, dtype: torch.dtype) -> BlockSums:
    """Compute all factors of the log decays `gate` (n, L, F), in one sweep from small blocks to large ones.

    The rounding of a sum is the relative error of its exponential, which grows with the decay. Outputs do not suffer,
    as little passes a strong decay, but the gradient of a factor is divided by the factor. Logs of factors therefore
    come in a wider dtype than `dtype`, and are multiplied as factors.
    """
    if gate.dtype != dtype:
        return _block_products(gate.exp(), dtype)
    before, after = gate.clone(), torch.zeros_like(gate)
    levels = []
    for block in _blocks(gate.shape[-2]):
        left, right = even(before, block), odd(before, block)
        levels.append(DecayLevel(block, right.exp(), even(after, block).exp()))
        even(after, block).add_(right[..., -1:, :])
        right.add_(left[..., -1:, :])
    if not levels:
        return BlockSums((), before.exp(), after.exp(), before.exp())
    into, out_of = _chunk_edges(levels[-1], before, after)
    return BlockSums(tuple(levels), into, out_of, into[:, -1:])


def _block_products(before: Tensor, dtype: torch.dtype) -> BlockSums:
    """Return the block products of factors from 0 to 1, (n, L, F), in place and in their own dtype."""
    after, levels = torch.ones_like(before), []
    for block in _blocks(before.shape[-2]):
        left, right = even(before, block), odd(before, block)
        levels.append(DecayLevel(block, right.to(dtype), even(after, block).to(dtype)))
        even(after, block).mul_(right[..., -1:, :])
        right.mul_(left[..., -1:, :])
    into = before.to(dtype)
    return BlockSums(tuple(levels), into, after.to(dtype), into[:, -1:])


def gate_gradient(adjoints: SumAdjoints) -> Tensor:
    """Compute the gradient of the log decays (n, L, F) through the sums, from large blocks to small ones.

    A decay's gradient adds up exactly the terms that cross its token; no difference of large terms is taken.
    """
    before, after, total = adjoints.into.clone(), adjoints.out_of.clone(), adjoints.total[:, None]
    for block, (rise, fall) in reversed(list(zip(_blocks(before.shape[-2]), adjoints.levels, strict=True))):
        left = total + odd(before, block).sum(-2, keepdim=True)
        right = total + even(after, block).sum(-2, keepdim=True)
        total = torch.stack((left, right), 2).flatten(1, 2)
        odd(before, block).add_(rise)
        even(after, block).add_(fall)
    return before.add_(total.flatten(1, 2))


def odd(x: Tensor, block: int) -> Tensor:
    """View the odd blocks of (…, L, F) as (…, L / (2 block), block, F)."""
    return _pairs(x, block).select(-3, 1)


def even(x: Tensor, block: int) -> Tensor:
    """View the even blocks of (…, L, F) as (…, L / (2 block), block, F)."""
    return _pairs(x, block).select(-3, 0)


def weighted(weights: Tensor, rows: Tensor) -> Tensor:
    """Multiply weights (…, b, b) by rows (…, b, F); column by column where b is too small for a matrix library."""
    if rows.shape[-2] > 2:
        return weights @ rows
    first, *others = (weights[..., at : at + 1] * rows[..., at : at + 1, :] for at in range(rows.shape[-2]))
    for term in others:
        first += term
    return first


def siblings(matrices: Tensor, block: int, row: int, column: int) -> Tensor:
    """View block (row, column) of each pair of siblings on the diagonal of (n, L, L) as (n, pairs, b, b)."""
    n, length, _ = matrices.shape
    chunk, down, right = matrices.stride()
    return matrices.as_strided(
        (n, length // (2 * block), block, block),
        (chunk, 2 * block * (down + right), down, right),
        matrices.storage_offset() + block * (row * down + column * right),
    )


def below(matrices: Tensor, block: int) -> Tensor:
    """View the pairs (t, j) of one level: rows in an odd block, columns in its even sibling."""
    return siblings(matrices, block, 1, 0)


def delayed(x: Tensor, first: float) -> Tensor:
    """Shift the rows of (…, L, F) to one token later; the first row becomes `first`."""
    return torch.cat((torch.full_like(x[..., :1, :], first), x[..., :-1, :]), -2)


def advanced(x: Tensor) -> Tensor:
    """Shift the rows of (…, L, F) to one token earlier; the last row becomes 0. The adjoint of `delayed`."""
    return torch.cat((x[..., 1:, :], torch.zeros_like(x[..., :1, :])), -2)


def _chunk_edges(last: DecayLevel, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `into` and `out_of` of a chunk from its last level: exponentials are slow, and half are reused."""
    into, out_of = torch.empty_like(before), torch.empty_like(after)
    first, second = even(into, last.block), odd(into, last.block)
    torch.exp(even(before, last.block), out=first)
    torch.mul(last.rise, first[..., -1:, :], out=second)
    torch.exp(odd(after, last.block), out=odd(out_of, last.block))
    torch.mul(last.fall, last.rise[..., -1:, :], out=even(out_of, last.block))
    return into, out_of


def _pairs(x: Tensor, block: int) -> Tensor:
    return x.view(*x.shape[:-2], x.shape[-2] // (2 * block), 2, block, x.shape[-1])


def _blocks(length: int) -> Iterator[int]:
    block = 1
    while block < length:
        yield block
        block *= 2
