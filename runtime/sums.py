"""Sums of terms over ranges, rows gathered by number, and systems solved step by step, on tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.runtime.device_constants import on_device
from attnc.runtime.pair_blocks import Alive, Int64

SCALES = (0.0, 1e3, 1e9, 1e15, 1e22, 1e30)
"""Terms between these sizes are added up apart, so that a large one takes no digits from ranges that it is not in."""


def covered(low: Int64, high: Int64, first: int, last: int) -> Alive:
    """Which numbers from `first` to `last` are in one of the ranges."""
    starts, ends = (np.bincount(end.reshape(-1) - first, minlength=last - first + 1) for end in (low, high))
    inside: Alive = np.cumsum(starts[:-1] - ends[:-1]) > 0
    return inside


def ranges(terms: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Sums of `terms` (heads, n) over ranges (heads or 1, rows, keys), low <= high."""
    head = torch.arange(len(terms), device=terms.device)[:, None, None]

    def between(values: Tensor) -> Tensor:
        sums = F.pad(values.cumsum(1), (1, 0))
        return sums[head, high] - sums[head, low]

    finite, size = terms.isfinite(), terms.detach().abs()
    total = between(torch.where(finite & (size <= SCALES[1]), terms, 0))
    for least, most in pairwise((*SCALES[1:], torch.inf)):
        here = finite & (size > least) & (size <= most)
        if here.any():
            total = total + between(torch.where(here, terms, 0))
    for value in (torch.inf, -torch.inf):
        if (terms == value).any():
            total = torch.where(between((terms == value).double()) > 0, total + value, total)
    return torch.where(between(terms.isnan().double()) > 0, torch.nan, total) if terms.isnan().any() else total


def numbered(low: Int64, high: Int64, first: int, last: int) -> Int64 | None:
    """The range (of n) that each number from `first` to `last` is in, n for none of them; None where they overlap."""
    order = np.argsort(low, kind="stable")
    starts, ends = low[order], high[order]
    filled = starts < ends
    starts, ends, order = starts[filled], ends[filled], order[filled]
    if (ends[:-1] > starts[1:]).any():
        return None
    found = np.full(last - first, len(low), dtype=np.int64)
    lengths = ends - starts
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    found[inside + np.repeat(starts - first, lengths)] = np.repeat(order, lengths)
    return found


def added_up(terms: Tensor, numbers: Tensor, count: int) -> Tensor:
    """Sums of terms (heads, n, …) that have a number (heads or 1, n), as `numbered` gives it: (heads, count, …)."""
    heads = len(terms)
    first = torch.arange(heads, device=terms.device)[:, None] * (count + 1)
    sums = terms.new_zeros((heads * (count + 1), *terms.shape[2:]))
    sums = sums.index_add(0, (first + numbers).reshape(-1), terms.flatten(0, 1))
    return torch.unflatten(sums, 0, (heads, count + 1))[:, :count]


def gathered(tensor: Tensor, indices: list[Tensor]) -> Tensor:
    """`tensor[indices]`. Its gradient is added up in one order, which that of indexing is not."""
    sizes = tensor.shape[: len(indices)]
    at = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for index, size in zip(indices, sizes, strict=True):
        at = at * size + index
    rows = tensor.reshape(-1, *tensor.shape[len(indices) :])
    return rows.index_select(0, at.reshape(-1)).reshape(*at.shape, *rows.shape[1:])


def taken(tensor: Tensor, heads: Int64, tokens: Int64) -> Tensor:
    """Tokens of heads of (heads, tokens, d): (heads, tokens, d), in place where both stand side by side."""
    if _consecutive(heads) and _consecutive(tokens):
        return tensor[heads[0] : heads[-1] + 1, tokens[0] : tokens[-1] + 1]
    return tensor[on_device(heads, tensor.device)[:, None], on_device(tokens, tensor.device)]


def _consecutive(numbers: Int64) -> bool:
    return len(numbers) > 0 and bool((np.diff(numbers) == 1).all())


def conjugate_gradients(matrix: Tensor, vector: Tensor, steps: int) -> Tensor:
    """Steps of conjugate gradients from 0 (Hestenes and Stiefel 1952), as long as there is something left."""
    return descend(lambda x: (matrix @ x[..., None])[..., 0], vector, steps)


def descend(times: Callable[[Tensor], Tensor], vector: Tensor, steps: int) -> Tensor:
    """The same of a matrix that is known by what it makes of vectors (…, d)."""
    found, rest = torch.zeros_like(vector), vector
    direction, size = rest, rest.square().sum(-1, keepdim=True)
    least = (size.detach() * torch.finfo(size.dtype).eps ** 2).clamp(min=torch.finfo(size.dtype).tiny)
    for _ in range(steps):
        ahead = times(direction)
        curve = (direction * ahead).sum(-1, keepdim=True)
        left = (size.detach() > least) & (curve.detach() != 0)
        step = torch.where(left, size / torch.where(left, curve, 1), 0)
        found, rest = found + step * direction, rest - step * ahead
        smaller = rest.square().sum(-1, keepdim=True)
        turn = torch.where(left, smaller / torch.where(left, size, 1), 0)
        direction, size = torch.where(left, rest + turn * direction, direction), torch.where(left, smaller, size)
    return found
