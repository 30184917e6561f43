"""Weights of token pairs in a chunk of coupled states, which mix by any real factors; no quotient is computed.

A token is a matrix (m + Q, m + P): the m states after it and its Q readers, as linear combinations of the m states
before it and its P impulses. A block of tokens is described by the weights of its impulses and of the states before it
in its readers and in the states after it. Two blocks are joined by products of such matrices, so a chunk of L tokens
takes log₂ L joins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class PairWeights(NamedTuple):
    """Pair weights of n blocks of L tokens; impulses and readers are ordered by token.

    `pairs` (n, L · Q, L · P): weights of impulses in readers. `edges` (n, L · Q, m): weights of the states before the
    block in readers. `ends` (n, m, L · P) and `through` (n, m, m): weights of impulses and of the states before the
    block in the states after it.
    """

    pairs: Tensor
    edges: Tensor
    ends: Tensor
    through: Tensor


class _Blocks(NamedTuple):
    """The `edges`, `ends` and `through` of blocks, without the pairs within them."""

    edges: Tensor
    ends: Tensor
    through: Tensor


def weights(mixes: Tensor, states: int, length: int, most: float | None = None) -> tuple[PairWeights, int]:
    """Return pair weights of blocks, and their length: `length`, a power of two, or less to keep weights below `most`.

    `mixes`: (tokens, m + Q, m + P), with m = `states`; the number of tokens is a multiple of `length`.
    """
    after, read = mixes[:, :states], mixes[:, states:]
    blocks = _Blocks(read[..., :states], after[..., states:], after[..., :states])
    pairs = [read[..., states:]]
    size = 1
    while size < length:
        larger, across = _joined(blocks)
        if most is not None and any(_exceeds(x, most) for x in (*larger, across)):
            break
        pairs.append(across)
        blocks, size = larger, 2 * size
    assembled = cast("Tensor", _Assembled.apply(size, *pairs))  # type: ignore[no-untyped-call]
    return PairWeights(assembled.flatten(3, 4).flatten(1, 2), *blocks), size


def _joined(blocks: _Blocks) -> tuple[_Blocks, Tensor]:
    """Join pairs of blocks; also return the weights of the first block's impulses in the second block's readers."""
    (before, after), (early, late), (left, right) = ((x[::2], x[1::2]) for x in blocks)
    joined = _Blocks(torch.cat([before, after @ left], 1), torch.cat([right @ early, late], 2), right @ left)
    return joined, after @ early


class _Assembled(torch.autograd.Function):
    """Assemble pairs (n, L, Q, L, P) from those within tokens and those between sibling blocks of 1, 2, 4, … tokens."""

    @staticmethod
    def forward(ctx: Any, length: int, *pairs: Tensor) -> Tensor:
        tokens, readers, impulses = pairs[0].shape
        result = pairs[0].new_zeros(tokens // length, length, readers, length, impulses)
        for view, weights_part in zip(_views(result, len(pairs)), pairs, strict=True):
            view.copy_(weights_part.view(view.shape))
        ctx.shapes = [weights_part.shape for weights_part in pairs]
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        views = _views(d_result.contiguous(), len(ctx.shapes))
        return (None, *(view.reshape(shape) for view, shape in zip(views, ctx.shapes, strict=True)))


def _views(pairs: Tensor, parts: int) -> Iterator[Tensor]:
    """Yield views of the pairs within tokens, and of those between blocks of s tokens, (n, L / 2s, s, Q, s, P)."""
    count, length, readers, _, impulses = pairs.shape
    yield pairs.diagonal(dim1=1, dim2=3).movedim(3, 1)
    for size in (1 << level for level in range(parts - 1)):
        blocks = length // (2 * size)
        halves = pairs.view(count, blocks, 2, size, readers, blocks, 2, size, impulses)[:, :, 1, :, :, :, 0]
        yield halves.diagonal(dim1=1, dim2=4).movedim(5, 1)


def _exceeds(x: Tensor, limit: float) -> bool:
    """Check whether a weight's magnitude is above `limit`; NaN is not."""
    return bool(x.numel()) and bool((x.detach().abs() > limit).any())


__all__ = ["PairWeights", "weights"]
