"""Inner products of vectors over lanes, also with vectors of a table that each lane chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from attnc.runtime.asking import surely_all
from attnc.runtime.device_constants import on_device
from attnc.runtime.pair_blocks import Alive, Int64
from attnc.runtime.sums import gathered

AT_ONCE = 16
"""Terms of a matrix product that take about as long as one number that is moved: gathered, or multiplied by itself."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """The inner product over the last dimension; a matrix product where each side has lanes that the other has not."""
    for a, b in ((left, right), (right, left)):
        if a.shape[-2] == 1 and b.shape[-3] == 1:
            return a[..., 0, :] @ b[..., 0, :, :].transpose(-1, -2)
    lanes = range(left.ndim - 1)
    rows, columns = _apart(left.shape, right.shape), _apart(right.shape, left.shape)
    if not (rows and columns):
        return (left * right).sum(-1)
    order = [*(i for i in lanes if i not in rows and i not in columns), *rows, *columns]
    shared = len(order) - len(rows) - len(columns)
    a, b = left.permute(*order, -1), right.permute(*order, -1)
    found = a.flatten(shared, -2) @ b.flatten(shared, -2).transpose(-1, -2)
    whole = [max(left.shape[i], right.shape[i]) for i in order]
    return found.reshape(whole).permute(*(order.index(i) for i in lanes))


def _apart(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The dimensions that one of two shapes has alone."""
    return [i for i, (m, n) in enumerate(zip(one, other, strict=True)) if m > 1 == n]


@dataclass(frozen=True)
class TableReads:
    """Which vector of a table (…, d) each lane reads: for each dimension in front its index, and who asks for one.

    Each index lies in the table, also where nobody asks, and has the lanes that it depends on.
    """

    indices: Sequence[Int64]
    alive: Alive

    @property
    def lanes(self) -> tuple[int, ...]:
        """The lanes that some index depends on."""
        return np.broadcast_shapes(*(index.shape for index in self.indices))


@dataclass(frozen=True)
class _TablePart:
    """The part of a table that lanes choose from, and how.

    `fixed`: dimensions whose index the vectors' own lanes say. `moving`: the others, with the first index and how many
    there are. `axis`: the dimension of lanes that the products are looked up along, which the vectors do not have.
    """

    axis: int
    fixed: Sequence[int]
    moving: Sequence[tuple[int, int, int]]

    @property
    def count(self) -> int:
        """Vectors to choose from."""
        return prod(count for _, _, count in self.moving)


def looked_up(table: Tensor, places: TableReads, vectors: Tensor) -> Tensor | None:
    """Inner products of vectors (…, d) with those that lanes choose from a table, 1 where nobody asks.

    Each is computed once for every vector that may be chosen, and looked up. None where that takes longer than to
    gather what is chosen.
    """
    lanes = np.broadcast_shapes(vectors.shape[:-1], places.lanes)
    alone = _apart(lanes, vectors.shape[:-1])
    if not alone or not places.alive.any():
        return None
    part = _part(places, alone, max(alone, key=lanes.__getitem__))
    if not _is_shorter(part, places, vectors, lanes):
        return None
    index, own = _index(part, places), _vectors(table, part, places, lanes)
    products = product(vectors.squeeze(part.axis).unsqueeze(-2), own)
    whole = [n for i, n in enumerate(lanes) if i != part.axis]
    at = on_device(np.moveaxis(index, part.axis, -1), table.device).expand(*whole, lanes[part.axis])
    found = products.expand(*whole, part.count).gather(-1, at).movedim(-1, part.axis)
    if places.alive.all():
        return found
    one = torch.ones((), dtype=found.dtype, device=found.device)
    return torch.where(on_device(places.alive, table.device), found, one)


def _part(places: TableReads, alone: Sequence[int], axis: int) -> _TablePart:
    fixed, moving = [], []
    for i, index in enumerate(places.indices):
        if all(index.shape[lane] == 1 for lane in alone):
            fixed.append(i)
            continue
        first = int(np.where(places.alive, index, np.iinfo(np.int64).max).min())
        last = int(np.where(places.alive, index, -1).max())
        moving.append((i, first, last - first + 1))
    return _TablePart(axis, fixed, moving)


def _is_shorter(part: _TablePart, places: TableReads, vectors: Tensor, lanes: tuple[int, ...]) -> bool:
    """Whether numbers that are moved and terms that are added up cost less than with a vector for each lane."""
    width, pairs, chosen = vectors.shape[-1], prod(lanes), prod(places.lanes)
    a_matrix = bool(_apart(vectors.shape[:-1], places.lanes))
    direct = width * chosen + (_of_matrices(pairs, width) if a_matrix else width * pairs)
    tables = prod(np.broadcast_shapes(*(places.indices[i].shape for i in part.fixed)))
    products = pairs // lanes[part.axis] * part.count
    return width * part.count * tables + _of_matrices(products, width) + pairs < direct


def _of_matrices(count: int, width: int) -> float:
    """What so many inner products by a matrix product cost, in numbers that are moved."""
    return count * (1 + width / AT_ONCE)


def _index(part: _TablePart, places: TableReads) -> Int64:
    """Which of the part's vectors each lane reads."""
    found = np.zeros((), dtype=np.int64)
    for i, first, count in part.moving:
        found = found * count + np.clip(places.indices[i] - first, 0, count - 1)
    return found


def _vectors(table: Tensor, part: _TablePart, places: TableReads, lanes: tuple[int, ...]) -> Tensor:
    """The vectors to choose from, (… without the axis, count, d).

    Zeros take the places of those that nobody asks for where some are no numbers: a gradient of 0 would not be one with
    them.
    """
    own = table.permute(*part.fixed, *(i for i, _, _ in part.moving), -1)
    for at, (_, first, count) in enumerate(part.moving, len(part.fixed)):
        own = own.narrow(at, first, count)
    own = own.flatten(len(part.fixed), -2)
    if part.fixed:
        fixed = [on_device(places.indices[i].squeeze(part.axis), table.device) for i in part.fixed]
        own = gathered(own, fixed)
    else:
        own = own[(None,) * (len(lanes) - 1)]
    if surely_all(own.isfinite()):
        return own
    asked = on_device(_asked(part, places, lanes, own.shape[:-1]), table.device)
    return torch.where(asked[..., None], own, torch.zeros((), dtype=own.dtype, device=own.device))


def _asked(part: _TablePart, places: TableReads, lanes: tuple[int, ...], shape: Sequence[int]) -> Alive:
    """Which of the vectors to choose from, (… without the axis, count), some lane asks for."""
    found = np.zeros(shape, dtype=np.bool_)
    at = np.nonzero(np.broadcast_to(places.alive, lanes))
    numbers = np.broadcast_to(_index(part, places), lanes)[at]
    others = [x for i, x in enumerate(at) if i != part.axis]
    front = (np.minimum(x, n - 1) for x, n in zip(others, shape, strict=False))
    entries = *front, numbers
    found[entries] = True
    return found
