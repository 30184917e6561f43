"""Live tiles of a relation that is constant along diagonals of tiles, except for a few rows and columns.

Windows, distances and blocks are constant along diagonals; sinks and global tokens are the exceptional columns and
rows. Equal tile rows are merged into one entry, so that the work does not grow with the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.box_values import FALSE, TRUE
from attnc.compiler.analysis.grid import TileGrid
from attnc.compiler.analysis.hashing import combine
from attnc.compiler.analysis.live_tiles import LiveTiles
from attnc.compiler.analysis.tilewise import Squares, Tilewise
from attnc.compiler.analysis.translation import Along, Dependence
from attnc.compiler.ir import Index, fold
from attnc.compiler.ir.rewrite import substitute

Int64 = NDArray[np.int64]

FEW = 16
"""Minimum number of tiles per side for which equal rows are searched."""

SPARSE = 4
"""Minimum ratio of tile rows to distinct tile rows for which merging pays."""

MOST_UNUSUAL = 16
"""Maximum number of exceptional rows or columns."""


def find_repeated_tiles(relation: Index, grid: TileGrid) -> LiveTiles | None:
    """Find the live tiles of a relation, with equal tile rows merged.

    None where a condition changes in other ways than across diagonals, rows or columns, or few rows are equal.
    """
    tilewise = Tilewise(relation, grid)
    if min(grid.rows, grid.columns) < FEW or not tilewise.is_simple:
        return None
    conditions = tilewise.conditions
    if all(c.along != "diagonals" for c in conditions.values()) or any(c.step > 1 for c in conditions.values()):
        return None
    rows, columns = (_usual_values(conditions, grid, side) for side in ("rows", "columns"))
    if rows is None or columns is None:
        return None
    live = _live_diagonals(Tilewise(substitute(relation, {**rows.usual, **columns.usual}), grid), grid)
    starts = _changes(tilewise, grid, live, rows.unusual, columns.unusual)
    tiles_to_classify = len(starts) * (len(live) + len(columns.unusual))
    if len(starts) * SPARSE > grid.rows or tiles_to_classify > SPARSE * (grid.rows + grid.columns):
        return None
    return _classified(tilewise, *_entries(grid, live, starts, rows.unusual, columns.unusual))


@dataclass(frozen=True, slots=True)
class _UsualValues:
    """The usual values of the conditions that depend on rows alone, or on columns alone, and the exceptions."""

    usual: Mapping[Index, Index]
    unusual: Int64


def _usual_values(conditions: Mapping[Index, Dependence], grid: TileGrid, side: Along) -> _UsualValues | None:
    """Find the usual values of the conditions that depend on one side alone; None where there are no usual values."""
    side_conditions = [condition for condition, dependence in conditions.items() if dependence.along == side]
    if not side_conditions:
        return _UsualValues({}, _NONE)
    places = np.arange(grid.rows if side == "rows" else grid.columns)
    none = np.zeros_like(places)
    squares = Squares(grid, 1, places, none) if side == "rows" else Squares(grid, 1, none, places)
    states = np.stack([Tilewise(condition, grid).states(squares) for condition in side_conditions])
    distinct_states, first, count = np.unique(states, axis=1, return_index=True, return_counts=True)
    decided = ((distinct_states == TRUE) | (distinct_states == FALSE)).all(axis=0)
    if not decided.any():
        return None
    usual = first[np.argmax(np.where(decided, count, 0))]
    unusual = np.flatnonzero((states != states[:, usual, None]).any(axis=0))
    if len(unusual) > MOST_UNUSUAL:
        return None
    return _UsualValues(
        {c: fold.truth(bool(s == TRUE)) for c, s in zip(side_conditions, states[:, usual], strict=True)}, unusual
    )


def _live_diagonals(usual: Tilewise, grid: TileGrid) -> Int64:
    """The diagonals (column less row) that may hold visible pairs; edges may cut a diagonal's first and last tile."""
    diagonal = np.arange(1 - grid.rows, grid.columns)
    first, last = np.maximum(0, -diagonal), np.minimum(grid.rows, grid.columns - diagonal) - 1
    rows = np.concatenate([first, (first + last) // 2, last])
    state = usual.states(Squares(grid, 1, rows, rows + np.tile(diagonal, 3))).reshape(3, -1)
    live: Int64 = diagonal[(state != FALSE).any(axis=0)]
    return live


def _changes(tilewise: Tilewise, grid: TileGrid, live: Int64, rows: Int64, columns: Int64) -> Int64:
    """The tile rows that differ from the row before.

    In such a row, a diagonal begins, ends or meets an unusual column, an edge cuts a tile, a tile of an unusual column
    differs from the tile above it, or the row itself or the row before is unusual.
    """
    meets = (columns[:, None] - live).ravel()
    row, column = (x.ravel() for x in np.meshgrid(np.arange(grid.rows), columns))
    keys = tilewise.keys(Squares(grid, 1, row, column)).reshape(len(columns), -1) if len(columns) else _NONE[None]
    differs = np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1
    edges = [-live, 1 - live, grid.columns - live - 1, grid.columns - live]
    changed = np.concatenate([*edges, meets, meets + 1, differs, rows, rows + 1, [0, grid.rows - 1]])
    return np.unique(changed[(changed >= 0) & (changed < grid.rows)])


def _entries(grid: TileGrid, live: Int64, starts: Int64, rows: Int64, columns: Int64) -> tuple[Squares, Int64, Int64]:
    """The tiles to classify, with repeat and slope: unusual rows whole, and the first of each group of equal rows."""
    repeat = np.diff(np.append(starts, grid.rows))
    usual = np.isin(starts, rows, invert=True)
    starts, repeat = starts[usual], repeat[usual]
    column = starts[:, None] + live
    sloping = (column >= 0) & (column < grid.columns) & np.isin(column, columns, invert=True)
    start, _ = np.nonzero(sloping)
    parts = (
        (starts[start], column[sloping], repeat[start], (repeat[start] > 1).astype(np.int64)),
        _all_pairs(starts, columns, repeat),
        _all_pairs(rows, np.arange(grid.columns), np.ones_like(rows)),
    )
    row, column, repeat, slope = (np.concatenate(p) for p in zip(*parts, strict=True))
    order = np.argsort(row * grid.columns + column)  # all keys differ, so the sort need not be stable
    return Squares(grid, 1, row[order], column[order]), repeat[order], slope[order]


def _all_pairs(rows: Int64, columns: Int64, repeat: Int64) -> tuple[Int64, Int64, Int64, Int64]:
    """All pairs of given rows and columns, with repeat and slope."""
    row, column = (x.ravel() for x in np.meshgrid(rows, columns, indexing="ij"))
    return row, column, np.repeat(repeat, len(columns)), np.zeros_like(row)


def _classified(tilewise: Tilewise, squares: Squares, repeat: Int64, slope: Int64) -> LiveTiles:
    """Return the live tiles among candidates, with their classes."""
    state = tilewise.states(squares)
    kind = combine(tilewise.keys(squares), squares.extents()) | np.uint64(1)
    kind = np.where(state == TRUE, np.uint64(0), kind)
    count = np.ones(len(squares), dtype=np.int64)
    tiles = LiveTiles(squares.grid, squares.rows, squares.columns, count, kind, repeat, slope)
    return tiles.take(np.flatnonzero(state != FALSE))


_NONE: Int64 = np.zeros(0, dtype=np.int64)
