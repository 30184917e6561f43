"""Full tiles as few rectangles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnc.compiler.tile_forms.arrays import Artefact, Int32, Int64, frozen, spread
from attnc.compiler.tile_forms.stretches import Stretches

MOST_BY_COLUMNS = 8
"""Columns are tried where they have at most so many times as many stretches as the rows have, and rows there are."""


@dataclass(frozen=True, eq=False)
class Rectangles(Artefact):
    """Rectangle i is the tile rows [row, row_end) and the tile columns [column, column_end); no two share a tile."""

    row: Int32
    row_end: Int32
    column: Int32
    column_end: Int32

    def __len__(self) -> int:
        return len(self.row)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        sides = (self.row, self.row_end, self.column, self.column_end)
        return iter(zip(*(side.tolist() for side in sides), strict=True))

    @property
    def tiles(self) -> int:
        """The number of tiles."""
        heights, widths = (self.row_end - self.row).astype(np.int64), self.column_end - self.column
        return int((heights * widths).sum())

    def listed(self) -> tuple[Int64, Int64]:
        """Row and column of every tile, by row and column."""
        height = self.row_end - self.row
        row = spread(self.row, self.row_end)
        start, end = np.repeat(self.column, height), np.repeat(self.column_end, height)
        rows, columns = np.repeat(row, end - start), spread(start, end)
        order = np.lexsort((columns, rows))
        return rows[order], columns[order]

    def __str__(self) -> str:
        lines = (f"rows {a}..{b}, columns {c}..{d}" for a, b, c, d in self)
        return "\n".join([f"{self.tiles} tiles in {len(self)} rectangles", *lines])


def merge_rectangles(tiles: Stretches) -> Rectangles:
    """Equal stretches of adjacent rows joined, or those of adjacent columns where that makes fewer rectangles."""
    row, row_end, column, column_end = _stacked(tiles)
    if tiles.by_columns <= MOST_BY_COLUMNS * (tiles.rows + len(tiles)):
        by_columns = _stacked(tiles.transposed())
        if len(by_columns[0]) < len(row):
            column, column_end, row, row_end = by_columns
    order = np.lexsort((column, row))
    return Rectangles(*(frozen(side[order]) for side in (row, row_end, column, column_end)))


def _stacked(tiles: Stretches) -> tuple[Int64, Int64, Int64, Int64]:
    """Rectangles of as many adjacent rows as have one stretch in common."""
    order = np.lexsort((tiles.row, tiles.end, tiles.start))
    row, start, end = (side[order].astype(np.int64) for side in (tiles.row, tiles.start, tiles.end))
    apart = (start[1:] != start[:-1]) | (end[1:] != end[:-1]) | (row[1:] != row[:-1] + 1)
    first, last = np.append(True, apart)[: len(row)], np.append(apart, True)[: len(row)]
    return row[first], row[last] + 1, start[first], end[first]
