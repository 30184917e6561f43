"""Rectangles of entries of a truth tensor: whether some hold, or all, read off sums from the first entry on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from attnc.compiler.analysis.questions import ReadQuestion, Span

MOST_CELLS = 1 << 26
"""Cells that are summed up, of one batch entry and head."""

Corners = tuple[tuple[int, Tensor], ...]
"""The sums that make up rectangles, each with its sign: numbers of the last cells, in rows of one more."""


@dataclass(frozen=True, eq=False)
class Rectangles:
    """Rectangles of a truth tensor's entries, which lie in `cells` of `cell` rows and places.

    `touched`: the cells that have some entry of a rectangle; `within`: cells of whose entries one is enough, where all
    are not asked for.
    """

    cell: tuple[int, int]
    cells: tuple[int, int]
    touched: Corners
    within: Corners | None

    @classmethod
    def of(cls, read: ReadQuestion, rows: int, places: int, device: torch.device) -> Rectangles:
        """Those that are read of so many rows and places.

        Cells are as large as the ends allow, so that nothing is lost; larger ones where they would be too many.
        """
        own_rows, own_places = _inside(read.rows, rows), _inside(read.places, places)
        sure = [] if read.sure is None else [_inside(read.sure, places)]
        cell = [_aligned(rows, [own_rows]), _aligned(places, [own_places, *sure])]
        while _count(rows, cell[0]) * _count(places, cell[1]) > MOST_CELLS:
            cell[int(_count(rows, cell[0]) < _count(places, cell[1]))] *= 2
        cells = _count(rows, cell[0]), _count(places, cell[1])
        touched = _corners(_outer(own_rows, cell[0]), _outer(own_places, cell[1]), cells, device)
        inner = [_corners(_inner(own_rows, rows, cell[0]), _inner(s, places, cell[1]), cells, device) for s in sure]
        return cls((cell[0], cell[1]), cells, touched, inner[0] if inner else None)

    @property
    def constants(self) -> Iterator[Tensor]:
        """What is read beside the truth tensor."""
        yield from (number for _, number in (*self.touched, *(self.within or ())))

    def states(self, given: Tensor) -> Tensor:
        """1 where all entries hold, or some of those within, -1 where none does: int8 (…, rectangles)."""
        sums = self._sums(given)
        some = _is_positive(sums, self.touched)
        if self.within is None:
            sure = ~_is_positive(self._sums(~given), self.touched)
        else:
            sure = _is_positive(sums, self.within)
        return some.to(torch.int8) + sure.to(torch.int8) - 1

    def _sums(self, given: Tensor) -> Tensor:
        """How many cells from the first to each have an entry that holds: (…, corners)."""
        below, behind = (a * n - m for a, n, m in zip(self.cell, self.cells, given.shape[-2:], strict=True))
        whole = F.pad(given, (0, behind, 0, below)) if below or behind else given
        if self.cell != (1, 1):
            sides = self.cells[0], self.cell[0], self.cells[1], self.cell[1]
            whole = whole.reshape(*whole.shape[:-2], *sides).any(-1).any(-2)
        sums = whole.cumsum(-1, dtype=torch.int32).cumsum(-2, dtype=torch.int32)
        return F.pad(sums, (1, 0, 1, 0)).flatten(-2)


def _is_positive(sums: Tensor, corners: Corners) -> Tensor:
    return reduce(torch.add, [sums.index_select(-1, number) * sign for sign, number in corners]) > 0


def _count(size: int, cell: int) -> int:
    return -(-size // cell)


def _inside(span: Span, size: int) -> Span:
    first, end = (np.clip(x, 0, size) for x in span)
    return first, np.maximum(first, end)


def _aligned(size: int, spans: list[Span]) -> int:
    """The largest cell of which all ends are multiples, but for the last."""
    ends = np.unique(np.concatenate([x for span in spans for x in span]))
    return int(np.gcd.reduce(ends[ends < size], initial=0)) or max(size, 1)


def _outer(span: Span, cell: int) -> Span:
    first = span[0] // cell
    return first, np.where(span[1] > span[0], -(-span[1] // cell), first)


def _inner(span: Span, size: int, cell: int) -> Span:
    first = -(-span[0] // cell)
    return first, np.maximum(np.where(span[1] == size, _count(size, cell), span[1] // cell), first)


def _corners(rows: Span, places: Span, cells: tuple[int, int], device: torch.device) -> Corners:
    """Signs and numbers of the sums that make up rectangles; those up to no row or no place are nothing."""
    found = []
    for sign, row, place in ((1, 1, 1), (-1, 0, 1), (-1, 1, 0), (1, 0, 0)):
        if (row and place) or (rows[row].any() and places[place].any()):
            found.append((sign, constant(rows[row] * (cells[1] + 1) + places[place], device)))
    return tuple(found)


def constant(
    array: NDArray[np.int64] | NDArray[np.bool_], device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """An array on a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)
