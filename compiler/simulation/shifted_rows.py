"""Tile rows of a relation that is the same after a shift of both places: all of them follow from a few.

If f(q + P, k + P) = f(q, k), and P is m tiles long, row r + m has the tiles of row r, each m further right. So the
first m rows and the last m rows say of every distance `column - row` what a tile there is, for each remainder of r by
m, and rows and columns are sums over distances. What holds of the first tokens alone, a sink perhaps, is cut off first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis.intervals import simplified
from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.analysis.translation import Dependences
from attnc.compiler.ir import Index
from attnc.compiler.planning.runs import resolve
from attnc.compiler.rewrite import substitute
from attnc.compiler.tile_forms.arrays import spread
from attnc.compiler.verify_ir import verified
from attnc.spec.source import Span

Int64 = NDArray[np.int64]

MOST_ROWS = 64
"""Rows after which the tiles repeat, at most."""

FIRST = (0, 1, 2, 4, 8, 16, 32, 64)
"""Tile rows and columns that may be unlike the rest, as those of sinks are."""


@dataclass(frozen=True, eq=False)
class RowCounts:
    """Full and partial tiles of every tile row and of every tile column, and visible pairs, None if not counted."""

    by_row: tuple[Int64, Int64]
    by_column: tuple[Int64, Int64]
    visible: int | None


@dataclass(frozen=True, slots=True)
class Repetition:
    """From tile row and column `first` on, `relation` is over places from there, and its tiles repeat every `rows`."""

    relation: Index
    first: int
    rows: int


def find_repetition(relation: Index, grid: TileGrid) -> Repetition | None:
    """After how many tile rows the tiles repeat; None where they do not, soon, or the matrix has ragged edges."""
    square = grid.q_tile == grid.k_tile and grid.columns >= grid.rows
    if not square or grid.k_origin or grid.n_q % grid.q_tile or grid.n_k % grid.k_tile:
        return None
    for first in FIRST:
        tokens = first * grid.q_tile
        if tokens >= grid.n_q:
            return None
        moved = _moved(relation, tokens, tokens) if first else relation
        moved = simplified(moved, (0, grid.n_q - tokens), (0, grid.n_k - tokens)) if first else moved
        growth = Dependences().growth(moved)
        if growth is not None and not growth.by:
            rows = lcm(growth.tokens, grid.q_tile) // grid.q_tile
            return Repetition(moved, first, rows) if rows <= MOST_ROWS and 2 * rows <= grid.rows - first else None
    return None


def count_shifted(relation: Index, grid: TileGrid, repetition: Repetition, origins: Mapping[Index, Span]) -> RowCounts:
    """The tiles of a grid whose rows repeat. Raises what `find_live_tiles` and `resolve` raise."""
    first, tile = repetition.first, grid.q_tile
    inner = replace(grid, n_q=grid.n_q - first * tile, n_k=grid.n_k - first * tile)
    seen = _by_distance(repetition, inner, origins)
    total_rows = np.zeros((3, grid.rows), dtype=np.int64)
    total_columns = np.zeros((3, grid.columns), dtype=np.int64)
    total_rows[:, first:] += _along_rows(seen, inner)
    total_columns[:, first:] += _along_columns(seen, inner)
    if first:
        top = _tiles(relation, replace(grid, n_q=first * tile), origins)
        left = _tiles(_moved(relation, first * tile, 0), replace(inner, n_k=first * tile), origins)
        total_rows[:, :first] += top.sum(2).T
        total_columns += top.sum(0)
        total_rows[:, first:] += left.sum(2).T
        total_columns[:, :first] += left.sum(0)
    by_row, by_column = ((x[0], x[1]) for x in (total_rows, total_columns))
    return RowCounts(by_row, by_column, int(total_rows[2].sum()))


@verified
def _moved(relation: Index, q: int, k: int) -> Index:
    """The relation over places from so many tokens on."""
    places = ((fold.place("q"), q), (fold.place("k"), k))
    return substitute(relation, {place: fold.add(place, fold.const(tokens)) for place, tokens in places if tokens})


def _by_distance(repetition: Repetition, grid: TileGrid, origins: Mapping[Index, Span]) -> Int64:
    """The tiles at every distance, for each remainder of a row: entry d + grid.rows - 1 is of distance d."""
    seen = np.zeros((repetition.rows, 3, grid.rows + grid.columns - 1), dtype=np.int64)
    some = replace(grid, n_q=repetition.rows * grid.q_tile)
    for row in (0, grid.rows - repetition.rows):
        band = _tiles(_moved(repetition.relation, row * grid.q_tile, 0), some, origins)
        for i in range(repetition.rows):
            at = grid.rows - 1 - row - i
            seen[(row + i) % repetition.rows, :, at : at + grid.columns] = band[i]
    return seen


def _tiles(relation: Index, grid: TileGrid, origins: Mapping[Index, Span]) -> Int64:
    """Return for every tile whether it is full, whether it is partial, and its visible pairs: (rows, 3, columns)."""
    resolved = resolve(relation, find_live_tiles(relation, grid), origins)
    tiles = resolved.tiles
    row, kind = (np.repeat(x, tiles.count) for x in (tiles.row, tiles.kind))
    at = spread(tiles.column, tiles.column + tiles.count)
    pairs = {0: grid.q_tile * grid.k_tile, **{key: int(mask.sum()) for key, mask in resolved.masks.items()}}
    kinds, number = np.unique(kind, return_inverse=True)
    visible = np.array([pairs[int(key)] for key in kinds], dtype=np.int64)
    result = np.zeros((grid.rows, 3, grid.columns), dtype=np.int64)
    result[row, 0, at] = kind == 0
    result[row, 1, at] = kind != 0
    result[row, 2, at] = visible[number.ravel()] if len(kind) else 0
    return result


def _along_rows(seen: Int64, grid: TileGrid) -> Int64:
    """Sums over the distances of every row."""
    rows, kinds, distances = seen.shape
    before = np.zeros((rows, kinds, distances + 1), dtype=np.int64)
    np.cumsum(seen, axis=2, out=before[:, :, 1:])
    row = np.arange(grid.rows)
    low = grid.rows - 1 - row
    found = before[row % rows, :, low + grid.columns] - before[row % rows, :, low]
    return np.asarray(found.T, dtype=np.int64)


def _along_columns(seen: Int64, grid: TileGrid) -> Int64:
    """Sums over the rows of every column, those of each remainder by themselves."""
    rows, kinds, _ = seen.shape
    column = np.arange(grid.columns)
    total = np.zeros((kinds, grid.columns), dtype=np.int64)
    for i in range(rows):
        padded = np.concatenate([np.zeros((kinds, rows), dtype=np.int64), seen[i]], axis=1)
        for start in range(rows):
            part = padded[:, start::rows]
            np.cumsum(part, axis=1, out=part)
        last = grid.rows - 1 - (grid.rows - 1 - i) % rows
        high, low = column - i + grid.rows - 1, column - last + grid.rows - 1
        total += padded[:, high + rows] - padded[:, low]
    return total
