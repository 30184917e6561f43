"""Weights of pairs of tokens in a chunk, of states that mix by matrices of numbers: any real ones, never a quotient.

Of a token: its m states after it and its Q readers, as mixes of the states before it and of its P impulses: a matrix
(m + Q, m + P). A block of tokens is what its readers take of its impulses and of the states before it, and what its end
is made of likewise; two blocks are joined by products of such matrices, so that a chunk of L tokens takes log₂ L joins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """Of n blocks of L tokens, the impulses of tokens and the readers of tokens one after another.

    What readers take of impulses, `pairs` (n, L · Q, L · P), and of the states before the block, `edges`
    (n, L · Q, m); what the states after it are made of, `ends` (n, m, L · P) and `through` (n, m, m).
    """

    pairs: Tensor
    edges: Tensor
    ends: Tensor
    through: Tensor


def single(mixes: Tensor, states: int) -> Weights:
    """Blocks of one token each, (n, m + Q, m + P)."""
    after, read = mixes[:, :states], mixes[:, states:]
    return Weights(read[..., states:], read[..., :states], after[..., states:], after[..., :states])


def joined(blocks: Weights) -> Weights:
    """Pairs of blocks as one each."""
    (first, second), (before, after), (early, late), (left, right) = ((x[::2], x[1::2]) for x in blocks)
    none = first.new_zeros(()).expand(*first.shape[:2], second.shape[2])
    pairs = torch.cat([torch.cat([first, none], 2), torch.cat([after @ early, second], 2)], 1)
    return Weights(pairs, torch.cat([before, after @ left], 1), torch.cat([right @ early, late], 2), right @ left)


def weights(mixes: Tensor, states: int, length: int, most: float | None = None) -> tuple[Weights, int]:
    """Of blocks of `length` tokens, a power of two; and their length: of shorter ones, where a weight is above `most`.

    `mixes`: (tokens, m + Q, m + P), tokens a multiple of `length`.
    """
    found, size = single(mixes, states), 1
    while size < length:
        larger = joined(found)
        if most is not None and any(_exceeds(x, most) for x in larger):
            break
        found, size = larger, 2 * size
    return found, size


def _exceeds(x: Tensor, most: float) -> bool:
    """Whether one is larger; what is no number is not."""
    return bool(x.numel()) and bool((x.detach().abs() > most).any())


__all__ = ["Weights", "weights"]
