"""Sets of tiles as stretches of adjacent columns, with union, difference and transposition.

No operation lists single tiles, except the methods whose results do: a triangle of n rows takes n stretches by row, and
n by column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.arrays import (
    Int32,
    Int64,
    frozen,
    pointers_of,
    spread,
)

Ends = tuple[Int64, Int64]
"""Ranges [low, high) on a line that holds the rows one after another, with a gap of one between rows."""

Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Stretches:
    """A set of tiles: row r has the columns [start, end) of its stretches `pointers[r] .. pointers[r + 1]`.

    Stretches are sorted by row and column; no stretch touches the next stretch of its row.
    """

    columns: int
    pointers: Int32
    start: Int32
    end: Int32

    def __len__(self) -> int:
        return len(self.start)

    @property
    def rows(self) -> int:
        """The number of tile rows."""
        return len(self.pointers) - 1

    @property
    def row(self) -> Int64:
        """The row of every stretch."""
        return np.repeat(np.arange(self.rows), self.per_row)

    @property
    def per_row(self) -> Int32:
        """The number of stretches of every row."""
        return np.diff(self.pointers)

    @property
    def tiles(self) -> int:
        """The number of tiles."""
        return int((self.end.astype(np.int64) - self.start).sum())

    def listed(self) -> tuple[Int64, Int64]:
        """Return the row and column of every tile, sorted by row and column."""
        return np.repeat(self.row, self.end - self.start), spread(self.start, self.end)

    def ends(self) -> Ends:
        """Return the stretches as ranges on the line."""
        base = self.row * (self.columns + 1)
        return base + self.start, base + self.end

    def union(self, other: Stretches) -> Stretches:
        """Return the union with another set of tiles."""
        return self._with(other, np.logical_or)

    def minus(self, other: Stretches) -> Stretches:
        """Return the tiles that are not in the other set."""
        return self._with(other, _without)

    def transposed(self) -> Stretches:
        """Return the transposed set, whose stretches are ranges of rows for each column.

        A column's stretch begins at a row that holds the column while the row before does not, and ends likewise.
        """
        width = self.columns + 1
        ends, above = self.ends(), self._above()
        first, last = (
            np.sort(_turned(spread(*_swept(a, b, _without)), width, self.rows))
            for a, b in ((ends, above), (above, ends))
        )
        taller = self.rows + 1
        return stretches(self.columns, self.rows, first // taller, first % taller, last % taller)

    def _above(self) -> Ends:
        """The ranges on the line moved down by a row: each row gets the stretches of the row before."""
        low, high = self.ends()
        return low + self.columns + 1, high + self.columns + 1

    def _with(self, other: Stretches, keep: Callable[[Flags, Flags], Flags]) -> Stretches:
        low, high = _swept(self.ends(), other.ends(), keep)
        width = self.columns + 1
        return stretches(self.rows, self.columns, low // width, low % width, high % width)


def stretches(rows: int, columns: int, row: NDArray[Any], start: NDArray[Any], end: NDArray[Any]) -> Stretches:
    """Return a set from disjoint column ranges sorted by row and column; drops empty ranges, joins adjacent ranges."""
    nonempty = end > start
    row, start, end = row[nonempty], start[nonempty], end[nonempty]
    separate = (row[1:] != row[:-1]) | (start[1:] != end[:-1])
    first, last = np.append(True, separate)[: len(row)], np.append(separate, True)[: len(row)]
    return Stretches(columns, pointers_of(row[first], rows), frozen(start[first]), frozen(end[last]))


def _without(a: Flags, b: Flags) -> Flags:
    return a & ~b


def _turned(position: Int64, width: int, rows: int) -> Int64:
    """Map positions on the line of rows to positions on the line of columns."""
    return position % width * (rows + 1) + position // width


def _swept(a: Ends, b: Ends, keep: Callable[[Flags, Flags], Flags]) -> Ends:
    """Return the ranges where `keep` is true, given whether a position lies in a range of `a` and in a range of `b`."""
    points = np.unique(np.concatenate([*a, *b]))
    kept = keep(_inside(a, points), _inside(b, points))
    kept_before = np.append(False, kept[:-1])[: len(kept)]
    return points[kept & ~kept_before], points[kept_before & ~kept]


def _inside(ends: Ends, points: Int64) -> Flags:
    low, high = ends
    return np.asarray(np.searchsorted(low, points, "right") > np.searchsorted(high, points, "right"))
