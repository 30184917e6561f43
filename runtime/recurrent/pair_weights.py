"""Weights of pairs of tokens in a chunk, of states that mix by matrices of numbers: any real ones, never a quotient.

Of a token: its m states after it and its Q readers, as mixes of the states before it and of its P impulses: a matrix
(m + Q, m + P). A block of tokens is what its readers take of its impulses and of the states before it, and what its end
is made of likewise; two blocks are joined by products of such matrices, so that a chunk of L tokens takes log₂ L joins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class PairWeights(NamedTuple):
    """Pair weights of n blocks of L tokens; the impulses and the readers of a block's tokens come one after another.

    What readers take of impulses, `pairs` (n, L · Q, L · P), and of the states before the block, `edges`
    (n, L · Q, m); what the states after it are made of, `ends` (n, m, L · P) and `through` (n, m, m).
    """

    pairs: Tensor
    edges: Tensor
    ends: Tensor
    through: Tensor


class _Blocks(NamedTuple):
    """Blocks but for the pairs within them: `edges`, `ends` and `through`."""

    edges: Tensor
    ends: Tensor
    through: Tensor


def weights(mixes: Tensor, states: int, length: int, most: float | None = None) -> tuple[PairWeights, int]:
    """Return pair weights of blocks, and their length: `length`, a power of two, or less where one is above `most`.

    `mixes`: (tokens, m + Q, m + P), tokens a multiple of `length`.
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
    whole = cast("Tensor", _Assembled.apply(size, *pairs))  # type: ignore[no-untyped-call]
    return PairWeights(whole.flatten(3, 4).flatten(1, 2), *blocks), size


def _joined(blocks: _Blocks) -> tuple[_Blocks, Tensor]:
    """Pairs of blocks as one each, and what the readers of the second take of the impulses of the first."""
    (before, after), (early, late), (left, right) = ((x[::2], x[1::2]) for x in blocks)
    both = _Blocks(torch.cat([before, after @ left], 1), torch.cat([right @ early, late], 2), right @ left)
    return both, after @ early


class _Assembled(torch.autograd.Function):
    """(n, L, Q, L, P) of a token's own pairs, and of those across from block to block of 1, 2, 4, … tokens."""

    @staticmethod
    def forward(ctx: Any, length: int, *pairs: Tensor) -> Tensor:
        tokens, readers, impulses = pairs[0].shape
        result = pairs[0].new_zeros(tokens // length, length, readers, length, impulses)
        for place, own in zip(_places(result, len(pairs)), pairs, strict=True):
            place.copy_(own.view(place.shape))
        ctx.shapes = [own.shape for own in pairs]
        return result

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor | None, ...]:
        places = _places(d_found.contiguous(), len(ctx.shapes))
        return (None, *(place.reshape(shape) for place, shape in zip(places, ctx.shapes, strict=True)))


def _places(whole: Tensor, parts: int) -> Iterator[Tensor]:
    """Views of the pairs within tokens, and of those across: (n, L / 2s, s, Q, s, P) for blocks of s tokens."""
    count, length, readers, _, impulses = whole.shape
    yield whole.diagonal(dim1=1, dim2=3).movedim(3, 1)
    for size in (1 << level for level in range(parts - 1)):
        blocks = length // (2 * size)
        halves = whole.view(count, blocks, 2, size, readers, blocks, 2, size, impulses)[:, :, 1, :, :, :, 0]
        yield halves.diagonal(dim1=1, dim2=4).movedim(5, 1)


def _exceeds(x: Tensor, most: float) -> bool:
    """Whether one is larger; what is no number is not."""
    return bool(x.numel()) and bool((x.detach().abs() > most).any())


__all__ = ["PairWeights", "weights"]
