"""Live tiles of a relation that is the same along every diagonal of tiles, but for few rows and columns.

Windows, distances and blocks are like that; sinks, global tokens and the like are the few columns and rows. Tile rows
alike are then one, so that what is touched does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis.box_values import FALSE, TRUE
from attnc.compiler.analysis.grid import TileGrid
from attnc.compiler.analysis.hashing import combine
from attnc.compiler.analysis.live_tiles import LiveTiles
from attnc.compiler.analysis.tilewise import Squares, Tilewise
from attnc.compiler.analysis.translation import Along, Dependence
from attnc.compiler.ir import Index
from attnc.compiler.rewrite import substitute

Int64 = NDArray[np.int64]

FEW = 16
"""Grids of fewer tiles a side are not looked at for rows alike."""

SPARSE = 4
"""Rows alike are worth a search where there are so many times fewer of them than rows."""

MOST_UNUSUAL = 16
"""Rows or columns that are not like the others."""


def find_repeated_tiles(relation: Index, grid: TileGrid) -> LiveTiles | None:
    """The live tiles of a relation, rows alike as one.

    None where a condition changes in another way than along diagonals, rows or columns, and where few rows are alike.
    """
    tilewise = Tilewise(relation, grid)
    if min(grid.rows, grid.columns) < FEW or not tilewise.is_simple:
        return None
    conditions = tilewise.conditions
    if all(c.along != "diagonals" for c in conditions.values()) or any(c.step > 1 for c in conditions.values()):
        return None
    rows, columns = (_one_way(conditions, grid, way) for way in ("rows", "columns"))
    if rows is None or columns is None:
        return None
    live = _live_diagonals(Tilewise(substitute(relation, {**rows.usual, **columns.usual}), grid), grid)
    starts = _changes(tilewise, grid, live, rows.unusual, columns.unusual)
    touched = len(starts) * (len(live) + len(columns.unusual))
    if len(starts) * SPARSE > grid.rows or touched > SPARSE * (grid.rows + grid.columns):
        return None
    return _classified(tilewise, *_entries(grid, live, starts, rows.unusual, columns.unusual))


@dataclass(frozen=True, slots=True)
class _OneWay:
    """The usual values of the conditions of rows alone, or of columns alone, and the exceptions."""

    usual: Mapping[Index, Index]
    unusual: Int64


def _one_way(conditions: Mapping[Index, Dependence], grid: TileGrid, way: Along) -> _OneWay | None:
    """None where there is nothing that they usually are."""
    mine = [condition for condition, dependence in conditions.items() if dependence.along == way]
    if not mine:
        return _OneWay({}, _NONE)
    places = np.arange(grid.rows if way == "rows" else grid.columns)
    none = np.zeros_like(places)
    squares = Squares(grid, 1, places, none) if way == "rows" else Squares(grid, 1, none, places)
    states = np.stack([Tilewise(condition, grid).states(squares) for condition in mine])
    states_found, first, count = np.unique(states, axis=1, return_index=True, return_counts=True)
    decided = ((states_found == TRUE) | (states_found == FALSE)).all(axis=0)
    if not decided.any():
        return None
    most = first[np.argmax(np.where(decided, count, 0))]
    unusual = np.flatnonzero((states != states[:, most, None]).any(axis=0))
    if len(unusual) > MOST_UNUSUAL:
        return None
    return _OneWay({c: fold.truth(bool(s == TRUE)) for c, s in zip(mine, states[:, most], strict=True)}, unusual)


def _live_diagonals(usual: Tilewise, grid: TileGrid) -> Int64:
    """The diagonals (column less row) that may hold something. The edges may cut the first and last tile of one."""
    diagonal = np.arange(1 - grid.rows, grid.columns)
    first, last = np.maximum(0, -diagonal), np.minimum(grid.rows, grid.columns - diagonal) - 1
    rows = np.concatenate([first, (first + last) // 2, last])
    state = usual.states(Squares(grid, 1, rows, rows + np.tile(diagonal, 3))).reshape(3, -1)
    live: Int64 = diagonal[(state != FALSE).any(axis=0)]
    return live


def _changes(tilewise: Tilewise, grid: TileGrid, live: Int64, rows: Int64, columns: Int64) -> Int64:
    """The rows that are not like the row before.

    A diagonal begins, ends or meets an unusual column there, an edge cuts a tile, a tile of an unusual column is not
    like the one above it, or the row or the one before is unusual.
    """
    meets = (columns[:, None] - live).ravel()
    row, column = (x.ravel() for x in np.meshgrid(np.arange(grid.rows), columns))
    keys = tilewise.keys(Squares(grid, 1, row, column)).reshape(len(columns), -1) if len(columns) else _NONE[None]
    differs = np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0)) + 1
    edges = [-live, 1 - live, grid.columns - live - 1, grid.columns - live]
    found = np.concatenate([*edges, meets, meets + 1, differs, rows, rows + 1, [0, grid.rows - 1]])
    return np.unique(found[(found >= 0) & (found < grid.rows)])


def _entries(grid: TileGrid, live: Int64, starts: Int64, rows: Int64, columns: Int64) -> tuple[Squares, Int64, Int64]:
    """The tiles to look at, with repeat and slope: unusual rows whole, of others the first of those alike."""
    repeat = np.diff(np.append(starts, grid.rows))
    usual = np.isin(starts, rows, invert=True)
    starts, repeat = starts[usual], repeat[usual]
    column = starts[:, None] + live
    sloping = (column >= 0) & (column < grid.columns) & np.isin(column, columns, invert=True)
    at, _ = np.nonzero(sloping)
    parts = (
        (starts[at], column[sloping], repeat[at], (repeat[at] > 1).astype(np.int64)),
        _every(starts, columns, repeat),
        _every(rows, np.arange(grid.columns), np.ones_like(rows)),
    )
    row, column, repeat, slope = (np.concatenate(p) for p in zip(*parts, strict=True))
    order = np.argsort(row * grid.columns + column)  # no two are equal
    return Squares(grid, 1, row[order], column[order]), repeat[order], slope[order]


def _every(rows: Int64, columns: Int64, repeat: Int64) -> tuple[Int64, Int64, Int64, Int64]:
    """Each of some rows with each of some columns, with repeat and slope."""
    row, column = (x.ravel() for x in np.meshgrid(rows, columns, indexing="ij"))
    return row, column, np.repeat(repeat, len(columns)), np.zeros_like(row)


def _classified(tilewise: Tilewise, squares: Squares, repeat: Int64, slope: Int64) -> LiveTiles:
    """The live ones among tiles."""
    state = tilewise.states(squares)
    kind = combine(tilewise.keys(squares), squares.extents()) | np.uint64(1)
    kind = np.where(state == TRUE, np.uint64(0), kind)
    count = np.ones(len(squares), dtype=np.int64)
    tiles = LiveTiles(squares.grid, squares.rows, squares.columns, count, kind, repeat, slope)
    return tiles.take(np.flatnonzero(state != FALSE))


_NONE: Int64 = np.zeros(0, dtype=np.int64)
