"""Count the live tiles of a relation in natural order: all tiles, a few repeating rows, or a sample of the rows.

If f(q + P, k + P) = f(q, k), and P is m tiles long, row r + m has the tiles of row r, each m columns further right. So
the first m rows and the last m rows determine the tile at every distance `column - row`, for each remainder of r modulo
m; counts of rows and columns are sums over distances. Leading tokens that differ, such as sinks, are cut off first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.arrays import spread
from attnc.compiler.analysis.intervals import simplified
from attnc.compiler.analysis.live_tiles import TileGrid, TooManyTilesError, find_live_tiles
from attnc.compiler.analysis.translation import Dependences
from attnc.compiler.ir import Index, fold
from attnc.compiler.ir.rewrite import substitute
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.planning.runs import resolve
from attnc.compiler.planning.tile_work import NATURAL, TileWork, strips
from attnc.spec.source import Span

Int64 = NDArray[np.int64]

MOST_ROWS = 64
"""Maximum number of rows after which tiles may repeat."""

FIRST = (0, 1, 2, 4, 8, 16, 32, 64)
"""Numbers of leading tile rows and columns to cut off, such as sinks."""


@dataclass(frozen=True, eq=False)
class RowCounts:
    """Full and partial tiles of every tile row and every tile column, and the visible pairs, None if not counted."""

    by_row: tuple[Int64, Int64]
    by_column: tuple[Int64, Int64]
    visible: int | None


@dataclass(frozen=True, slots=True)
class Repetition:
    """A relation whose tiles repeat every `rows` tile rows from tile row and column `first` on.

    `relation`: the relation over positions counted from there.
    """

    relation: Index
    first: int
    rows: int


def find_repetition(relation: Index, grid: TileGrid) -> Repetition | None:
    """Return how tiles repeat; None if they do not within MOST_ROWS rows, or if the grid has clipped tiles."""
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
    """Count the tiles of a grid whose rows repeat. Raises as `find_live_tiles` and `resolve` do."""
    first, tile = repetition.first, grid.q_tile
    inner = replace(grid, n_q=grid.n_q - first * tile, n_k=grid.n_k - first * tile)
    by_distance = _by_distance(repetition, inner, origins)
    total_rows = np.zeros((3, grid.rows), dtype=np.int64)
    total_columns = np.zeros((3, grid.columns), dtype=np.int64)
    total_rows[:, first:] += _along_rows(by_distance, inner)
    total_columns[:, first:] += _along_columns(by_distance, inner)
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
    """Return the relation over positions that start `q` rows and `k` keys later."""
    places = ((fold.place("q"), q), (fold.place("k"), k))
    return substitute(relation, {place: fold.add(place, fold.const(tokens)) for place, tokens in places if tokens})


def _by_distance(repetition: Repetition, grid: TileGrid, origins: Mapping[Index, Span]) -> Int64:
    """Return the tiles at every distance, for each remainder of a row: distance d is entry d + grid.rows - 1."""
    by_distance = np.zeros((repetition.rows, 3, grid.rows + grid.columns - 1), dtype=np.int64)
    band_grid = replace(grid, n_q=repetition.rows * grid.q_tile)
    for row in (0, grid.rows - repetition.rows):
        band = _tiles(_moved(repetition.relation, row * grid.q_tile, 0), band_grid, origins)
        for i in range(repetition.rows):
            offset = grid.rows - 1 - row - i
            by_distance[(row + i) % repetition.rows, :, offset : offset + grid.columns] = band[i]
    return by_distance


def _tiles(relation: Index, grid: TileGrid, origins: Mapping[Index, Span]) -> Int64:
    """Return for every tile whether it is full, whether it is partial, and its visible pairs: (rows, 3, columns)."""
    resolved = resolve(relation, find_live_tiles(relation, grid), origins)
    tiles = resolved.tiles
    row, kind = (np.repeat(x, tiles.count) for x in (tiles.row, tiles.kind))
    column = spread(tiles.column, tiles.column + tiles.count)
    pairs = {0: grid.q_tile * grid.k_tile, **{key: int(mask.sum()) for key, mask in resolved.masks.items()}}
    kinds, number = np.unique(kind, return_inverse=True)
    visible = np.array([pairs[int(key)] for key in kinds], dtype=np.int64)
    result = np.zeros((grid.rows, 3, grid.columns), dtype=np.int64)
    result[row, 0, column] = kind == 0
    result[row, 1, column] = kind != 0
    result[row, 2, column] = visible[number.ravel()] if len(kind) else 0
    return result


def _along_rows(by_distance: Int64, grid: TileGrid) -> Int64:
    """Return the counts of every row, as sums over its distances."""
    rows, kinds, distances = by_distance.shape
    before = np.zeros((rows, kinds, distances + 1), dtype=np.int64)
    np.cumsum(by_distance, axis=2, out=before[:, :, 1:])
    row = np.arange(grid.rows)
    low = grid.rows - 1 - row
    totals = before[row % rows, :, low + grid.columns] - before[row % rows, :, low]
    return np.asarray(totals.T, dtype=np.int64)


def _along_columns(by_distance: Int64, grid: TileGrid) -> Int64:
    """Return the counts of every column, as sums over its rows for each remainder."""
    rows, kinds, _ = by_distance.shape
    column = np.arange(grid.columns)
    total = np.zeros((kinds, grid.columns), dtype=np.int64)
    for i in range(rows):
        padded = np.concatenate([np.zeros((kinds, rows), dtype=np.int64), by_distance[i]], axis=1)
        for start in range(rows):
            part = padded[:, start::rows]
            np.cumsum(part, axis=1, out=part)
        last = grid.rows - 1 - (grid.rows - 1 - i) % rows
        high, low = column - i + grid.rows - 1, column - last + grid.rows - 1
        total += padded[:, high + rows] - padded[:, low]
    return total


Origins = Mapping[Index, Span]

FEW, MANY = 1 << 16, 1 << 21
"""Maximum numbers of undecided boxes in natural order: if the relation has another order, and if it has none."""

SOME, HUGE = 1 << 18, 1 << 24
"""Maximum number of undecided boxes of a huge matrix without another order, and the number of tiles of a huge one."""

LARGE_TILE, SAMPLES = 128, 32
"""Minimum side of square tiles that are sampled if there are too many to count, and the number of sampled tile rows."""

GOLDEN = 0.6180339887498949
"""The golden ratio minus 1: the fractions of its multiples fill 0 … 1 evenly, and on no grid."""

REPEATED = 1 << 16
"""Number of tiles of a matrix from which repeating rows are counted once."""


def count_natural(relation: Index, grid: TileGrid, origins: Origins, *, alone: bool) -> TileWork:
    """Count the tiles of adjacent tokens; `alone`: whether the relation has no other order.

    If it has other orders, the tiles are counted only if they are few. If it has none and large tiles are too many to
    count, some tile rows are counted and represent the others (`sampled`).

    Raises TooManyTilesError, TooManyClassesError, EvaluationError.
    """
    repetition = find_repetition(relation, grid) if grid.rows * grid.columns >= REPEATED else None
    if repetition is not None:
        return _tile_work(grid, count_shifted(relation, grid, repetition, origins))
    budget = FEW if not alone else SOME if grid.rows * grid.columns >= HUGE else MANY
    try:
        return _tile_work(grid, _counts(relation, grid, origins, budget))
    except TooManyTilesError:
        if not alone or grid.q_tile != grid.k_tile or grid.q_tile < LARGE_TILE or grid.rows < 2 * SAMPLES:
            raise
        return _sampled(relation, grid, origins)


def _tile_work(grid: TileGrid, counts: RowCounts) -> TileWork:
    by_row, by_column = strips(*counts.by_row), strips(*counts.by_column)
    return TileWork(NATURAL, grid.q_tile, grid.k_tile, by_row, by_column, counts.visible)


def _sampled(relation: Index, grid: TileGrid, origins: Origins) -> TileWork:
    """Return tiles estimated from a sample of tile rows, each of which represents the rows around it.

    Columns are weighted sums over the sampled rows. The rows are unevenly spaced, so that the sample does not resonate
    with a period of the relation.
    """
    ends = np.linspace(0, grid.rows, SAMPLES + 1).astype(np.int64)
    sampled_rows = ends[:-1] + (np.arange(SAMPLES) * GOLDEN % 1 * np.diff(ends)).astype(np.int64)
    q = fold.place("q")
    samples = [
        _counts(
            substitute(relation, {q: fold.add(q, fold.const(row * grid.q_tile))}),
            replace(grid, n_q=min(grid.q_tile, grid.n_q - row * grid.q_tile)),
            origins,
            MANY,
        )
        for row in sampled_rows.tolist()
    ]
    times = np.diff(ends)
    rows = [np.array([sample.by_row[i][0] for sample in samples]) for i in (0, 1)]
    columns = [
        np.sum([sample.by_column[i] * n for sample, n in zip(samples, times.tolist(), strict=True)], 0) for i in (0, 1)
    ]
    counts = [sample.visible for sample in samples]
    visible = None
    if None not in counts:
        visible = sum(n * int(times[i]) for i, n in enumerate(counts) if n is not None)
    work = TileWork(
        NATURAL, grid.q_tile, grid.k_tile, strips(rows[0], rows[1], times), strips(columns[0], columns[1]), visible
    )
    return replace(work, sampled=SAMPLES)


def _counts(relation: Index, grid: TileGrid, origins: Origins, budget: int) -> RowCounts:
    """Count all tiles of a grid, with at most `budget` undecided boxes."""
    resolved = resolve(relation, find_live_tiles(relation, grid, budget), origins)
    tiles, is_full = resolved.tiles, resolved.tiles.kind == 0
    row, column = [], []
    for marks in (is_full, ~is_full):
        count = tiles.count[marks]
        row.append(np.bincount(tiles.row[marks], weights=count, minlength=grid.rows).astype(np.int64))
        column.append(_covered(tiles.column[marks], count, grid.columns))
    return RowCounts((row[0], row[1]), (column[0], column[1]), resolved.visible)


def _covered(start: Int64, count: Int64, columns: int) -> Int64:
    """Return the number of stretches that contain each column."""
    begins, ends = (np.bincount(edge, minlength=columns + 1) for edge in (start, start + count))
    return np.cumsum(begins - ends)[:columns].astype(np.int64)
