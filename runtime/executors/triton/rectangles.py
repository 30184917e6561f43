"""Rectangles of entries of a bool tensor: whether some or all entries hold, read from 2D prefix sums."""

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
"""Maximum number of cells per batch entry and head."""

Corners = tuple[tuple[int, Tensor], ...]
"""The prefix sums that make up rectangles, each with its sign, as indices into rows of one more cell."""


@dataclass(frozen=True, eq=False)
class Rectangles:
    """Rectangles of a bool tensor's entries, which are grouped into `cells` of `cell` rows and blocks.

    `touched`: the cells that share an entry with a rectangle; `within`: cells of which one true entry is enough, if not
    all entries are required.
    """

    cell: tuple[int, int]
    cells: tuple[int, int]
    touched: Corners
    within: Corners | None

    @classmethod
    def of(cls, read: ReadQuestion, rows: int, blocks: int, device: torch.device) -> Rectangles:
        """Return the rectangles that a question reads from `rows` rows and `places` blocks.

        Cells are as large as the rectangle ends allow without loss; larger if there would be more than `MOST_CELLS`.
        """
        row_span, block_span = _inside(read.rows, rows), _inside(read.places, blocks)
        sure_spans = [] if read.sure is None else [_inside(read.sure, blocks)]
        cell = [_aligned(rows, [row_span]), _aligned(blocks, [block_span, *sure_spans])]
        while _count(rows, cell[0]) * _count(blocks, cell[1]) > MOST_CELLS:
            cell[int(_count(rows, cell[0]) < _count(blocks, cell[1]))] *= 2
        cells = _count(rows, cell[0]), _count(blocks, cell[1])
        touched = _corners(_outer(row_span, cell[0]), _outer(block_span, cell[1]), cells, device)
        inner = [
            _corners(_inner(row_span, rows, cell[0]), _inner(s, blocks, cell[1]), cells, device) for s in sure_spans
        ]
        return cls((cell[0], cell[1]), cells, touched, inner[0] if inner else None)

    @property
    def constants(self) -> Iterator[Tensor]:
        """The device tensors that are read besides the bool tensor."""
        yield from (number for _, number in (*self.touched, *(self.within or ())))

    def states(self, mask: Tensor) -> Tensor:
        """Return 1 if all entries hold, or some entry within, -1 if none holds, else 0: int8 (…, rectangles)."""
        sums = self._sums(mask)
        any_holds = _is_positive(sums, self.touched)
        if self.within is None:
            sure = ~_is_positive(self._sums(~mask), self.touched)
        else:
            sure = _is_positive(sums, self.within)
        return any_holds.to(torch.int8) + sure.to(torch.int8) - 1

    def _sums(self, mask: Tensor) -> Tensor:
        """Count, up to each corner, the cells that hold a true entry: (…, corners)."""
        row_padding, column_padding = (
            a * n - m for a, n, m in zip(self.cell, self.cells, mask.shape[-2:], strict=True)
        )
        padded = F.pad(mask, (0, column_padding, 0, row_padding)) if row_padding or column_padding else mask
        if self.cell != (1, 1):
            sides = self.cells[0], self.cell[0], self.cells[1], self.cell[1]
            padded = padded.reshape(*padded.shape[:-2], *sides).any(-1).any(-2)
        sums = padded.cumsum(-1, dtype=torch.int32).cumsum(-2, dtype=torch.int32)
        return F.pad(sums, (1, 0, 1, 0)).flatten(-2)


def _is_positive(sums: Tensor, corners: Corners) -> Tensor:
    return reduce(torch.add, [sums.index_select(-1, number) * sign for sign, number in corners]) > 0


def _count(size: int, cell: int) -> int:
    return -(-size // cell)


def _inside(span: Span, size: int) -> Span:
    first, end = (np.clip(x, 0, size) for x in span)
    return first, np.maximum(first, end)


def _aligned(size: int, spans: list[Span]) -> int:
    """Return the largest cell size that divides all ends, except an end at `size`."""
    ends = np.unique(np.concatenate([x for span in spans for x in span]))
    return int(np.gcd.reduce(ends[ends < size], initial=0)) or max(size, 1)


def _outer(span: Span, cell: int) -> Span:
    first = span[0] // cell
    return first, np.where(span[1] > span[0], -(-span[1] // cell), first)


def _inner(span: Span, size: int, cell: int) -> Span:
    first = -(-span[0] // cell)
    return first, np.maximum(np.where(span[1] == size, _count(size, cell), span[1] // cell), first)


def _corners(rows: Span, blocks: Span, cells: tuple[int, int], device: torch.device) -> Corners:
    """Return the signs and indices of the prefix sums of rectangles; sums up to row or block 0 are omitted."""
    corners = []
    for sign, row, place in ((1, 1, 1), (-1, 0, 1), (-1, 1, 0), (1, 0, 0)):
        if (row and place) or (rows[row].any() and blocks[place].any()):
            corners.append((sign, constant(rows[row] * (cells[1] + 1) + blocks[place], device)))
    return tuple(corners)


def constant(
    array: NDArray[np.int64] | NDArray[np.bool_], device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """Copy an array to a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, dtype)
