"""Live tiles of a relation, found by descending a quadtree with interval analysis: only what is live is touched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.hashing import Hash, combine, mix
from attnc.compiler.analysis.intervals import FALSE, TRUE, Boxes, classify
from attnc.compiler.ir import Index

Int64 = NDArray[np.int64]

CHUNK = 1 << 16
"""Boxes analysed at once; bounds the memory of the descent."""


class TooManyTilesError(Exception):
    """The relation has more undecided tiles than the budget: tiles of this size do not describe it."""


@dataclass(frozen=True, slots=True)
class Grid:
    """n_q rows and n_k keys in tiles. Key tiles start at `k_origin` (≤ 0), so that a diagonal can meet corners."""

    n_q: int
    n_k: int
    q_tile: int
    k_tile: int
    k_origin: int = 0

    @property
    def rows(self) -> int:
        """Tile rows."""
        return -(-self.n_q // self.q_tile)

    @property
    def columns(self) -> int:
        """Tile columns."""
        return -(-(self.n_k - self.k_origin) // self.k_tile)

    def row_range(self, row: int) -> tuple[int, int]:
        """The rows of a tile row, half-open."""
        return row * self.q_tile, min((row + 1) * self.q_tile, self.n_q)

    def key_range(self, column: int) -> tuple[int, int]:
        """The keys of a tile column, half-open."""
        start = self.k_origin + column * self.k_tile
        return max(start, 0), min(start + self.k_tile, self.n_k)


@dataclass(frozen=True, slots=True)
class LiveTiles:
    """Stretches of live tiles, sorted by row and column: `row`, first column, number of columns, and class.

    Class 0 is full; any other is partial, one tile long, and equal classes hold equal masks.
    """

    grid: Grid
    row: Int64
    column: Int64
    count: Int64
    kind: Hash

    @property
    def full(self) -> int:
        """Number of tiles that analysis found full."""
        return int(self.count[self.kind == 0].sum())

    @property
    def partial(self) -> int:
        """Number of tiles that analysis left undecided."""
        return int((self.kind != 0).sum())


def find_live_tiles(relation: Index, grid: Grid, budget: int = 1 << 21) -> LiveTiles:
    """The live tiles of a specialised relation.

    Raises TooManyTilesError when more than `budget` boxes of one level stay undecided.
    """
    levels = max(grid.rows, grid.columns, 1) - 1
    level = levels.bit_length()
    frontier: list[tuple[Int64, Int64]] = [(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))]
    found: list[tuple[Int64, Int64, Int64, Hash]] = []
    while frontier:
        undecided: list[tuple[Int64, Int64]] = []
        for rows, columns in frontier:
            undecided.extend(_visit(relation, grid, level, rows, columns, found))
        frontier = undecided
        if sum(len(rows) for rows, _ in frontier) > budget:
            raise TooManyTilesError
        level -= 1
    return _sorted(grid, found)


def _visit(
    relation: Index, grid: Grid, level: int, rows: Int64, columns: Int64, found: list[tuple[Int64, Int64, Int64, Hash]]
) -> list[tuple[Int64, Int64]]:
    """Classify boxes of 2^level tiles a side; record what is decided, return the halves of the rest."""
    size = 1 << level
    inside = (rows * size < grid.rows) & (columns * size < grid.columns)
    rows, columns = rows[inside], columns[inside]
    undecided = []
    for start in range(0, len(rows), CHUNK):
        r, c = rows[start : start + CHUNK], columns[start : start + CHUNK]
        boxes = _boxes(grid, size, r, c)
        truths = classify(relation, boxes, keyed=level == 0)
        state = np.broadcast_to(truths.state, r.shape)
        full, open_ = state == TRUE, (state != TRUE) & (state != FALSE)
        found.extend(_full(grid, size, r[full], c[full]))
        if level == 0:
            kind = np.broadcast_to(truths.key, r.shape)[open_]
            extents = (mix(boxes.q_high - boxes.q_low), mix(boxes.k_high - boxes.k_low))
            kind = combine(kind, *(e[open_] for e in extents)) | np.uint64(1)
            found.append((r[open_], c[open_], np.ones(len(kind), dtype=np.int64), kind))
        elif open_.any():
            undecided.append(_halves(r[open_], c[open_]))
    return undecided


def _boxes(grid: Grid, size: int, rows: Int64, columns: Int64) -> Boxes:
    q_low = rows * size * grid.q_tile
    k_low = grid.k_origin + columns * size * grid.k_tile
    q_high = np.minimum(q_low + size * grid.q_tile, grid.n_q) - 1
    k_high = np.minimum(k_low + size * grid.k_tile, grid.n_k) - 1
    return Boxes(q_low, q_high, np.maximum(k_low, 0), k_high)


def _full(grid: Grid, size: int, rows: Int64, columns: Int64) -> list[tuple[Int64, Int64, Int64, Hash]]:
    """A full box as one stretch a tile row."""
    if not len(rows):
        return []
    heights = np.minimum((rows + 1) * size, grid.rows) - rows * size
    widths = np.minimum((columns + 1) * size, grid.columns) - columns * size
    within = np.arange(heights.sum()) - np.repeat(np.cumsum(heights) - heights, heights)
    row = np.repeat(rows * size, heights) + within
    column, count = np.repeat(columns * size, heights), np.repeat(widths, heights)
    return [(row, column, count, np.zeros(len(row), dtype=np.uint64))]


def _halves(rows: Int64, columns: Int64) -> tuple[Int64, Int64]:
    row = np.concatenate([rows * 2, rows * 2, rows * 2 + 1, rows * 2 + 1])
    column = np.concatenate([columns * 2, columns * 2 + 1, columns * 2, columns * 2 + 1])
    return row, column


def _sorted(grid: Grid, found: list[tuple[Int64, Int64, Int64, Hash]]) -> LiveTiles:
    if not found:
        empty = np.zeros(0, dtype=np.int64)
        return LiveTiles(grid, empty, empty, empty, empty.astype(np.uint64))
    row, column, count, kind = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((column, row))
    return LiveTiles(grid, row[order], column[order], count[order], kind[order])
