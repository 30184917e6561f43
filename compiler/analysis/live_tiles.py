"""Live tiles of a relation, found by descending a quadtree with interval analysis; empty boxes are never descended."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.box_values import FALSE, TRUE
from attnc.compiler.analysis.grid import TileGrid
from attnc.compiler.analysis.hashing import Hash, combine
from attnc.compiler.analysis.tilewise import Squares, Tilewise
from attnc.compiler.ir import Index

Int64 = NDArray[np.int64]

_Stretches = tuple[Int64, Int64, Int64, Hash]
"""The row, first column, number of columns and class of each stretch of tiles."""

__all__ = ["LiveTiles", "TileGrid", "TooManyTilesError", "find_live_tiles"]


class TooManyTilesError(Exception):
    """Raised where a relation has more undecided tiles than the budget: tiles of this size do not describe it."""


@dataclass(frozen=True, slots=True)
class LiveTiles:
    """Stretches of live tiles, sorted by row and column: `row`, first column, number of columns, and class.

    Class 0 is full; every other class is partial, its stretches are one tile long, and equal classes have equal masks.
    An entry stands for `repeat` rows; from row to row it moves one tile down and `slope` tiles right (0 or 1).
    """

    grid: TileGrid
    row: Int64
    column: Int64
    count: Int64
    kind: Hash
    repeat: Int64
    slope: Int64

    @property
    def full(self) -> int:
        """The number of tiles that analysis found full."""
        return int((self.count * self.repeat)[self.kind == 0].sum())

    @property
    def partial(self) -> int:
        """The number of tiles that analysis left undecided."""
        return int(self.repeat[self.kind != 0].sum())

    def take(self, which: Int64) -> LiveTiles:
        """Return a selection of the entries, by number."""
        row, column, count = (x[which] for x in (self.row, self.column, self.count))
        return LiveTiles(self.grid, row, column, count, self.kind[which], self.repeat[which], self.slope[which])


def find_live_tiles(relation: Index, grid: TileGrid, budget: int = 1 << 21) -> LiveTiles:
    """Find the live tiles of a specialised relation.

    Raises TooManyTilesError when the undecided boxes of a level have more than `budget` quarters.
    """
    tilewise = Tilewise(relation, grid)
    steps, first = (2, FIRST) if tilewise.is_simple else (1, 1)
    size = 1 << max(0, (max(grid.rows, grid.columns, 1) - 1).bit_length() - first.bit_length() + 1)
    rows, columns = (x.ravel() for x in np.indices((first, first)))
    squares = _inside(Squares(grid, size, rows, columns))
    stretches: list[_Stretches] = []
    while len(squares):
        state = tilewise.states(squares)
        stretches.extend(_full(squares.where(state == TRUE)))
        squares = squares.where((state != TRUE) & (state != FALSE))
        if not len(squares):
            break
        if squares.size == 1:
            stretches.append(_partial(tilewise, squares))
            break
        if len(squares) * 4 > budget:
            raise TooManyTilesError
        for _ in range(min(steps, squares.size.bit_length() - 1)):
            squares = _halves(squares)
    return _sorted(grid, stretches)


def _inside(squares: Squares) -> Squares:
    """Return the squares that are at least partly inside the matrix."""
    grid, size = squares.grid, squares.size
    return squares.where((squares.rows * size < grid.rows) & (squares.columns * size < grid.columns))


def _partial(tilewise: Tilewise, squares: Squares) -> _Stretches:
    kind = combine(tilewise.keys(squares), squares.extents()) | np.uint64(1)
    return squares.rows, squares.columns, np.ones(len(squares), dtype=np.int64), kind


def _full(squares: Squares) -> list[_Stretches]:
    """Return full boxes as stretches, one for each tile row."""
    grid, size, rows, columns = squares.grid, squares.size, squares.rows, squares.columns
    if not len(rows):
        return []
    heights = np.minimum((rows + 1) * size, grid.rows) - rows * size
    widths = np.minimum((columns + 1) * size, grid.columns) - columns * size
    within = np.arange(heights.sum()) - np.repeat(np.cumsum(heights) - heights, heights)
    row = np.repeat(rows * size, heights) + within
    column, count = np.repeat(columns * size, heights), np.repeat(widths, heights)
    return [(row, column, count, np.zeros(len(row), dtype=np.uint64))]


def _halves(squares: Squares) -> Squares:
    """Return the four quarters of each box."""
    rows = np.repeat(squares.rows * 2, 4)
    columns = np.repeat(squares.columns * 2, 4)
    rows[2::4] += 1
    rows[3::4] += 1
    columns[1::2] += 1
    return _inside(Squares(squares.grid, squares.size // 2, rows, columns))


def _sorted(grid: TileGrid, stretches: list[_Stretches]) -> LiveTiles:
    if not stretches:
        empty = np.zeros(0, dtype=np.int64)
        return LiveTiles(grid, empty, empty, empty, empty.astype(np.uint64), empty, empty)
    row, column, count, kind = (np.concatenate(parts) for parts in zip(*stretches, strict=True))
    order = np.argsort(row * grid.columns + column)  # all keys differ, so the sort need not be stable
    repeat, slope = (np.broadcast_to(np.int64(x), len(row)) for x in (1, 0))
    return LiveTiles(grid, row[order], column[order], count[order], kind[order], repeat, slope)


FIRST = 16
"""Number of boxes per side to start with, where boxes are cheap to analyse."""
