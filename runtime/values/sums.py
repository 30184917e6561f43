"""Range sums, gathers with a deterministic gradient, and conjugate gradients, on tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.runtime.process.device_constants import on_device
from attnc.runtime.values.pair_blocks import Int64, PairMask

SCALES = (0.0, 1e3, 1e9, 1e15, 1e22, 1e30)
"""Bounds of magnitude classes that are summed separately, so that a large term costs no digits in ranges without it."""


def covered(low: Int64, high: Int64, first: int, last: int) -> PairMask:
    """Return for each integer from `first` to `last` - 1 whether it lies in one of the ranges."""
    starts, ends = (np.bincount(end.reshape(-1) - first, minlength=last - first + 1) for end in (low, high))
    inside: PairMask = np.cumsum(starts[:-1] - ends[:-1]) > 0
    return inside


def ranges(terms: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return sums of `terms` (heads, n) over ranges (heads or 1, rows, keys) with low <= high."""
    head = torch.arange(len(terms), device=terms.device)[:, None, None]

    def between(values: Tensor) -> Tensor:
        sums = F.pad(values.cumsum(1), (1, 0))
        return sums[head, high] - sums[head, low]

    finite, size = terms.isfinite(), terms.detach().abs()
    total = between(torch.where(finite & (size <= SCALES[1]), terms, 0))
    for lower, upper in pairwise((*SCALES[1:], torch.inf)):
        in_class = finite & (size > lower) & (size <= upper)
        if in_class.any():
            total = total + between(torch.where(in_class, terms, 0))
    for value in (torch.inf, -torch.inf):
        if (terms == value).any():
            total = torch.where(between((terms == value).double()) > 0, total + value, total)
    return torch.where(between(terms.isnan().double()) > 0, torch.nan, total) if terms.isnan().any() else total


def numbered(low: Int64, high: Int64, first: int, last: int) -> Int64 | None:
    """Return the index of the range that holds each integer in [first, last), n for none; None if ranges overlap."""
    order = np.argsort(low, kind="stable")
    starts, ends = low[order], high[order]
    filled = starts < ends
    starts, ends, order = starts[filled], ends[filled], order[filled]
    if (ends[:-1] > starts[1:]).any():
        return None
    numbers = np.full(last - first, len(low), dtype=np.int64)
    lengths = ends - starts
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    numbers[inside + np.repeat(starts - first, lengths)] = np.repeat(order, lengths)
    return numbers


def added_up(terms: Tensor, numbers: Tensor, count: int) -> Tensor:
    """Return sums (heads, count, …) of terms (heads, n, …) by the numbers (heads or 1, n) that `numbered` returns."""
    heads = len(terms)
    first = torch.arange(heads, device=terms.device)[:, None] * (count + 1)
    sums = terms.new_zeros((heads * (count + 1), *terms.shape[2:]))
    sums = sums.index_add(0, (first + numbers).reshape(-1), terms.flatten(0, 1))
    return torch.unflatten(sums, 0, (heads, count + 1))[:, :count]


def gathered(tensor: Tensor, indices: list[Tensor]) -> Tensor:
    """Return `tensor[indices]` with a gradient summed in a fixed order, which the gradient of indexing is not."""
    sizes = tensor.shape[: len(indices)]
    at = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for index, size in zip(indices, sizes, strict=True):
        at = at * size + index
    rows = tensor.reshape(-1, *tensor.shape[len(indices) :])
    return rows.index_select(0, at.reshape(-1)).reshape(*at.shape, *rows.shape[1:])


def taken(tensor: Tensor, heads: Int64, tokens: Int64) -> Tensor:
    """Select heads and tokens of (heads, tokens, d), as a view where both are consecutive."""
    if _consecutive(heads) and _consecutive(tokens):
        return tensor[heads[0] : heads[-1] + 1, tokens[0] : tokens[-1] + 1]
    return tensor[on_device(heads, tensor.device)[:, None], on_device(tokens, tensor.device)]


def _consecutive(numbers: Int64) -> bool:
    return len(numbers) > 0 and bool((np.diff(numbers) == 1).all())


def conjugate_gradients(matrix: Tensor, vector: Tensor, steps: int) -> Tensor:
    """Solve by steps of conjugate gradients from 0 (Hestenes and Stiefel 1952), until the residual vanishes."""
    return descend(lambda x: (matrix @ x[..., None])[..., 0], vector, steps)


def descend(times: Callable[[Tensor], Tensor], vector: Tensor, steps: int) -> Tensor:
    """Solve by conjugate gradients for a matrix given as the function that multiplies it with vectors (…, d)."""
    solution, residual = torch.zeros_like(vector), vector
    direction, size = residual, residual.square().sum(-1, keepdim=True)
    tolerance = (size.detach() * torch.finfo(size.dtype).eps ** 2).clamp(min=torch.finfo(size.dtype).tiny)
    for _ in range(steps):
        image = times(direction)
        curvature = (direction * image).sum(-1, keepdim=True)
        unsolved = (size.detach() > tolerance) & (curvature.detach() != 0)
        step = torch.where(unsolved, size / torch.where(unsolved, curvature, 1), 0)
        solution, residual = solution + step * direction, residual - step * image
        new_size = residual.square().sum(-1, keepdim=True)
        turn = torch.where(unsolved, new_size / torch.where(unsolved, size, 1), 0)
        direction = torch.where(unsolved, residual + turn * direction, direction)
        size = torch.where(unsolved, new_size, size)
    return solution
