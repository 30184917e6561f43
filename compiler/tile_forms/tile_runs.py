"""Tiles as runs: for each tile row, the ranges of adjacent full tiles and of adjacent partial tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.arrays import (
    Int32,
    Int64,
    Mask,
    frozen,
)
from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.planning.runs import ResolvedRuns
from attnc.compiler.tile_forms.tile_ranges import Stretches, stretches


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
