"""Tiles as lists: for each tile row, the columns of its full tiles and the columns of its partial tiles.

Tiles as runs: for each tile row, the ranges of adjacent full tiles and of adjacent partial tiles. Sets of tiles are
stretches of adjacent columns, with union, difference and transposition. No operation lists single tiles, except the
methods whose results do: a triangle of n rows takes n stretches by row, and n by column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.arrays import (
    Int32,
    Int64,
    Mask,
    frozen,
    pointers_of,
    spread,
)
from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.planning.runs import ResolvedRuns

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


@dataclass(frozen=True, eq=False)
class TileFrame:
    """The number of tokens of every tile row and column; rows and columns at the edges may have fewer than `tile`."""

    tile: tuple[int, int]
    heights: Int32
    widths: Int32

    @property
    def rows(self) -> int:
        """The number of tile rows."""
        return len(self.heights)

    @property
    def columns(self) -> int:
        """The number of tile columns."""
        return len(self.widths)

    def transposed(self) -> TileFrame:
        """Return the frame of the transposed matrix."""
        return TileFrame((self.tile[1], self.tile[0]), self.widths, self.heights)


def frame_of(grid: TileGrid) -> TileFrame:
    """Return the frame of a grid of tiles."""
    row, column = np.arange(grid.rows), np.arange(grid.columns)
    heights = np.minimum((row + 1) * grid.q_tile, grid.n_q) - row * grid.q_tile
    start = grid.k_origin + column * grid.k_tile
    widths = np.minimum(start + grid.k_tile, grid.n_k) - np.maximum(start, 0)
    return TileFrame((grid.q_tile, grid.k_tile), frozen(heights), frozen(widths))


@dataclass(frozen=True, eq=False)
class TileRuns:
    """Runs of full tiles, and runs of partial tiles with the class of every tile, sorted by row and column.

    The visible pairs of a tile of class c are `masks[c]`: bool (tokens of its row, tokens of its column). No two masks
    are equal.
    """

    frame: TileFrame
    full: Stretches
    partial: Stretches
    classes: Int32
    masks: tuple[Mask, ...]

    @property
    def visible(self) -> int:
        """The number of visible pairs."""
        keys_before = np.append(0, np.cumsum(self.frame.widths, dtype=np.int64))
        full_pairs = (keys_before[self.full.end] - keys_before[self.full.start]) * self.frame.heights[self.full.row]
        return int(full_pairs.sum()) + int(self.visible_by_class[self.classes].sum())

    @property
    def visible_by_class(self) -> Int64:
        """The number of visible pairs of a tile of each class."""
        return np.array([int(mask.sum()) for mask in self.masks], dtype=np.int64)

    def transposed(self) -> TileRuns:
        """Return the runs by tile column: rows are keys and columns are queries, also in the masks."""
        row, column = self.partial.listed()
        order = np.lexsort((row, column))
        masks = tuple(frozen(mask.T, np.bool_) for mask in self.masks)
        classes = frozen(self.classes[order])
        return TileRuns(self.frame.transposed(), self.full.transposed(), self.partial.transposed(), classes, masks)

    def __str__(self) -> str:
        lines = [f"{self.full.tiles} full and {self.partial.tiles} partial tiles, {len(self.masks)} masks"]
        for row in range(self.frame.rows):
            parts = [
                name + " " + ", ".join(f"{a}..{b}" for a, b in _row_ranges(tiles, row))
                for name, tiles in (("full", self.full), ("partial", self.partial))
                if tiles.per_row[row]
            ]
            lines.append(f"{row}: {'; '.join(parts) or 'nothing'}")
        return "\n".join(lines)


def _row_ranges(tiles: Stretches, row: int) -> list[tuple[int, int]]:
    row_slice = slice(tiles.pointers[row], tiles.pointers[row + 1])
    return list(zip(tiles.start[row_slice].tolist(), tiles.end[row_slice].tolist(), strict=True))


def find_tile_runs(resolved: ResolvedRuns) -> TileRuns:
    """Find the runs of tiles whose classes are resolved; classes with equal masks are merged."""
    tiles, frame = resolved.tiles, frame_of(resolved.tiles.grid)
    parts = []
    for selected in (tiles.kind == 0, tiles.kind != 0):
        row, column, count = tiles.row[selected], tiles.column[selected], tiles.count[selected]
        parts.append(stretches(frame.rows, frame.columns, row, column, column + count))
    kinds, number = np.unique(tiles.kind[tiles.kind != 0], return_inverse=True)
    classes, masks = join_classes(number, [resolved.masks[int(kind)] for kind in kinds])
    return TileRuns(frame, parts[0], parts[1], classes, masks)


def join_classes(classes: NDArray[Any], masks: Sequence[Mask]) -> tuple[Int32, tuple[Mask, ...]]:
    """Renumber classes by first occurrence, and merge classes with equal masks."""
    used, first = np.unique(classes, return_index=True)
    numbers: dict[tuple[tuple[int, ...], bytes], int] = {}
    renamed = np.zeros(len(masks), dtype=np.int64)
    kept: list[Mask] = []
    for i in used[np.argsort(first)].tolist():
        key = (masks[i].shape, np.packbits(masks[i]).tobytes())
        renamed[i] = numbers.setdefault(key, len(numbers))
        if renamed[i] == len(kept):
            kept.append(frozen(masks[i], np.bool_))
    return frozen(renamed[classes]), tuple(kept)


def mask_edges(runs: TileRuns) -> TileRuns:
    """Turn full tiles that an edge of the matrix cuts into partial tiles with all-true masks.

    Kernels then read full tiles without checking where the matrix ends.
    """
    frame, full = runs.frame, runs.full
    low, narrow = np.flatnonzero(frame.heights < frame.tile[0]), np.flatnonzero(frame.widths < frame.tile[1])
    bottom = stretches(full.rows, full.columns, low, np.zeros_like(low), np.full_like(low, full.columns))
    row, column = np.repeat(np.arange(full.rows), len(narrow)), np.tile(narrow, full.rows)
    inner = full.minus(bottom).minus(stretches(full.rows, full.columns, row, column, column + 1))
    edge = full.minus(inner)
    edge_row, edge_column = edge.listed()
    shapes, shape = np.unique(
        np.stack([frame.heights[edge_row], frame.widths[edge_column]], axis=1), axis=0, return_inverse=True
    )
    rows, columns = (np.append(a, b) for a, b in zip(runs.partial.listed(), (edge_row, edge_column), strict=True))
    order = np.lexsort((columns, rows))
    number = np.append(runs.classes, shape.ravel() + len(runs.masks))[order]
    masks = [*runs.masks, *(np.ones(size, dtype=np.bool_) for size in shapes.tolist())]
    classes, kept = join_classes(number, masks)
    return replace(runs, full=inner, partial=runs.partial.union(edge), classes=classes, masks=kept)


@dataclass(frozen=True, eq=False)
class TileColumns:
    """A set of tiles sorted by row and column: row r has the columns `columns[pointers[r] : pointers[r + 1]]`."""

    pointers: Int32
    columns: Int32

    def __len__(self) -> int:
        return len(self.columns)

    def of_row(self, row: int) -> Int32:
        """Return the columns of a row."""
        return self.columns[self.pointers[row] : self.pointers[row + 1]]


@dataclass(frozen=True, eq=False)
class TileLists:
    """Full tiles, and partial tiles with their classes.

    The visible pairs of a tile of class c are `masks[c]`: bool (tokens of its row, tokens of its column).
    """

    frame: TileFrame
    full: TileColumns
    partial: TileColumns
    classes: Int32
    masks: tuple[Mask, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.full)} full and {len(self.partial)} partial tiles, {len(self.masks)} masks"]
        for row in range(self.frame.rows):
            partial_slice = slice(self.partial.pointers[row], self.partial.pointers[row + 1])
            partial_tiles = zip(
                self.partial.columns[partial_slice].tolist(), self.classes[partial_slice].tolist(), strict=True
            )
            parts = [
                *(["full " + " ".join(map(str, self.full.of_row(row).tolist()))] if len(self.full.of_row(row)) else []),
                *(
                    ["partial " + " ".join(f"{c}:{kind}" for c, kind in partial_tiles)]
                    if partial_slice.stop > partial_slice.start
                    else []
                ),
            ]
            lines.append(f"{row}: {'; '.join(parts) or 'nothing'}")
        return "\n".join(lines)


def list_tiles(runs: TileRuns) -> TileLists:
    """Return the tiles of runs as lists."""
    segments = []
    for tiles in (runs.full, runs.partial):
        row, column = tiles.listed()
        segments.append(TileColumns(pointers_of(row, tiles.rows), frozen(column)))
    return TileLists(runs.frame, segments[0], segments[1], runs.classes, runs.masks)
