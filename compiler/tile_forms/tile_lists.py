"""Tiles as lists: for each tile row, the columns of its full tiles and the columns of its partial tiles."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.analysis.arrays import (
    Int32,
    Mask,
    frozen,
    pointers_of,
)
from attnc.compiler.tile_forms.tile_runs import TileFrame, TileRuns


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
