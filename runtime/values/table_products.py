"""Inner products of vectors over pairs, and lookups of inner products with the vectors of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from attnc.runtime.call.asking import surely_all
from attnc.runtime.process.device_constants import on_device
from attnc.runtime.values.pair_blocks import Int64, PairMask
from attnc.runtime.values.sums import gathered

AT_ONCE = 16
"""Terms of a matrix product that take about as long as moving one number: a gather, or an elementwise product."""

_BLOCK_DIMS = 4
"""Dimensions of vectors over one block: heads, rows, keys and the head dimension; loops come before them."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product over the last dimension, by a matrix product where each side has dimensions alone."""
    dims = range(left.ndim - 1)
    rows, columns = _apart(left.shape[:-1], right.shape[:-1]), _apart(right.shape[:-1], left.shape[:-1])
    loops = range(left.ndim - _BLOCK_DIMS)
    if not any(i in loops for i in (*rows, *columns)):  # else a batch of products would repeat vectors for every loop
        for a, b in ((left, right), (right, left)):
            if a.shape[-2] == 1 and b.shape[-3] == 1:
                return a[..., 0, :] @ b[..., 0, :, :].transpose(-1, -2)
    if not (rows and columns):
        return (left * right).sum(-1)
    order = [*(i for i in dims if i not in rows and i not in columns), *rows, *columns]
    shared = len(order) - len(rows) - len(columns)
    a, b = left.permute(*order, -1), right.permute(*order, -1)
    products = a.flatten(shared, -2) @ b.flatten(shared, -2).transpose(-1, -2)
    shape = [max(left.shape[i], right.shape[i]) for i in order]
    return products.reshape(shape).permute(*(order.index(i) for i in dims))


def _apart(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Return the dimensions in which `one` is larger than 1 and `other` is 1."""
    return [i for i, (m, n) in enumerate(zip(one, other, strict=True)) if m > 1 == n]


@dataclass(frozen=True)
class TableReads:
    """Vectors of a table (…, d) that pairs read: one index array per leading dimension, and the active pairs.

    Each index is in range, for inactive pairs too, and has size 1 in the pair dimensions that it does not depend on.
    """

    indices: Sequence[Int64]
    active: PairMask

    @property
    def pairs(self) -> tuple[int, ...]:
        """The shape that the indices broadcast to."""
        return np.broadcast_shapes(*(index.shape for index in self.indices))


@dataclass(frozen=True)
class _TablePart:
    """The part of a table that pairs select from.

    `axis`: the pair dimension along which the products are gathered; the vectors have size 1 in it. `fixed`: table
    dimensions whose index does not vary where the vectors have size 1. `moving`: all other table dimensions, each with
    its first index and its number of indices.
    """

    axis: int
    fixed: Sequence[int]
    moving: Sequence[tuple[int, int, int]]

    @property
    def count(self) -> int:
        """The number of vectors to select from."""
        return prod(count for _, _, count in self.moving)


def looked_up(table: Tensor, reads: TableReads, vectors: Tensor) -> Tensor | None:
    """Return inner products of vectors (…, d) with the table vectors that pairs select, and 1 for inactive pairs.

    Products with all vectors that may be selected are computed once and gathered. None where that takes longer than
    gathering the selected vectors.
    """
    pairs = np.broadcast_shapes(vectors.shape[:-1], reads.pairs)
    alone = _apart(pairs, vectors.shape[:-1])
    if not alone or not reads.active.any():
        return None
    part = _part(reads, alone, max(alone, key=pairs.__getitem__))
    if not _is_faster(part, reads, vectors, pairs):
        return None
    index, table_vectors = _index(part, reads), _vectors(table, part, reads, pairs)
    products = product(vectors.squeeze(part.axis).unsqueeze(-2), table_vectors)
    others = [n for i, n in enumerate(pairs) if i != part.axis]
    at = on_device(np.moveaxis(index, part.axis, -1), table.device).expand(*others, pairs[part.axis])
    selected = products.expand(*others, part.count).gather(-1, at).movedim(-1, part.axis)
    if reads.active.all():
        return selected
    one = torch.ones((), dtype=selected.dtype, device=selected.device)
    return torch.where(on_device(reads.active, table.device), selected, one)


def _part(reads: TableReads, alone: Sequence[int], axis: int) -> _TablePart:
    """Return the part of the table that is read, gathered along `axis`; `alone`: dimensions that vectors lack."""
    fixed, moving = [], []
    for i, index in enumerate(reads.indices):
        if all(index.shape[dim] == 1 for dim in alone):
            fixed.append(i)
            continue
        first = int(np.where(reads.active, index, np.iinfo(np.int64).max).min())
        last = int(np.where(reads.active, index, -1).max())
        moving.append((i, first, last - first + 1))
    return _TablePart(axis, fixed, moving)


def _is_faster(part: _TablePart, reads: TableReads, vectors: Tensor, pairs: tuple[int, ...]) -> bool:
    """Check that a lookup moves and adds fewer numbers than gathering one table vector per pair."""
    width, count, selected = vectors.shape[-1], prod(pairs), prod(reads.pairs)
    is_matrix = bool(_apart(vectors.shape[:-1], reads.pairs))
    direct = width * selected + (_matrix_cost(count, width) if is_matrix else width * count)
    tables = prod(np.broadcast_shapes(*(reads.indices[i].shape for i in part.fixed)))
    products = count // pairs[part.axis] * part.count
    return width * part.count * tables + _matrix_cost(products, width) + count < direct


def _matrix_cost(count: int, width: int) -> float:
    """Return the cost of `count` inner products by a matrix product, in numbers moved."""
    return count * (1 + width / AT_ONCE)


def _index(part: _TablePart, reads: TableReads) -> Int64:
    """Return the index, among the part's vectors, of the vector that each pair reads."""
    index = np.zeros((), dtype=np.int64)
    for i, first, count in part.moving:
        index = index * count + np.clip(reads.indices[i] - first, 0, count - 1)
    return index


def _vectors(table: Tensor, part: _TablePart, reads: TableReads, pairs: tuple[int, ...]) -> Tensor:
    """Return the vectors to select from, (… without the axis, count, d).

    Unused non-finite vectors are replaced by zero, so that zero gradients stay zero.
    """
    vectors = table.permute(*part.fixed, *(i for i, _, _ in part.moving), -1)
    for at, (_, first, count) in enumerate(part.moving, len(part.fixed)):
        vectors = vectors.narrow(at, first, count)
    vectors = vectors.flatten(len(part.fixed), -2)
    if part.fixed:
        fixed = [on_device(reads.indices[i].squeeze(part.axis), table.device) for i in part.fixed]
        vectors = gathered(vectors, fixed)
    else:
        vectors = vectors[(None,) * (len(pairs) - 1)]
    if surely_all(vectors.isfinite()):
        return vectors
    used = on_device(_used(part, reads, pairs, vectors.shape[:-1]), table.device)
    return torch.where(used[..., None], vectors, torch.zeros((), dtype=vectors.dtype, device=vectors.device))


def _used(part: _TablePart, reads: TableReads, pairs: tuple[int, ...], shape: Sequence[int]) -> PairMask:
    """Return which of the vectors to select from, (… without the axis, count), an active pair reads."""
    used = np.zeros(shape, dtype=np.bool_)
    at = np.nonzero(np.broadcast_to(reads.active, pairs))
    numbers = np.broadcast_to(_index(part, reads), pairs)[at]
    others = [x for i, x in enumerate(at) if i != part.axis]
    front = (np.minimum(x, n - 1) for x, n in zip(others, shape, strict=False))
    entries = *front, numbers
    used[entries] = True
    return used
