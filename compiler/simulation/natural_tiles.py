"""The live tiles of a relation as its tokens stand: one by one, by rows that repeat, or in a part of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from attnc.compiler import fold
from attnc.compiler.analysis.live_tiles import TileGrid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index
from attnc.compiler.planning.runs import resolve
from attnc.compiler.rewrite import substitute
from attnc.compiler.simulation.shifted_rows import RowCounts, count_shifted, find_repetition
from attnc.compiler.simulation.strips import Int64, strips
from attnc.compiler.simulation.tile_work import NATURAL, TileWork
from attnc.spec.source import Span

Origins = Mapping[Index, Span]

FEW, MANY = 1 << 16, 1 << 21
"""Undecided boxes that are looked into, in natural order: with another order at hand, and without."""

SOME, HUGE = 1 << 18, 1 << 24
"""Limits for a matrix with a huge number of tiles and no other order: undecided boxes, and what counts as huge."""

LARGE_TILE, SAMPLES = 128, 32
"""The side of the square tiles that are sampled where they are too many to count, and the rows counted then."""

GOLDEN = 0.6180339887498949
"""Multiples of it fall evenly between 0 and 1, and on no grid."""

REPEATED = 1 << 16
"""Tiles of a matrix from which on rows that repeat are counted by a few of them."""


def count_natural(relation: Index, grid: TileGrid, origins: Origins, *, alone: bool) -> TileWork:
    """Tiles of adjacent tokens; `alone`: the relation has no other order.

    Where it has others, the tiles are counted only if they are few; where it has none, large tiles that are too many to
    count are counted in some rows, which stand for the others (`sampled`).

    Raises TooManyTilesError, TooManyClassesError, EvaluationError.
    """
    found = find_repetition(relation, grid) if grid.rows * grid.columns >= REPEATED else None
    if found is not None:
        return _work_of(grid, count_shifted(relation, grid, found, origins))
    budget = FEW if not alone else SOME if grid.rows * grid.columns >= HUGE else MANY
    try:
        return _work_of(grid, _counts(relation, grid, origins, budget))
    except TooManyTilesError:
        if not alone or grid.q_tile != grid.k_tile or grid.q_tile < LARGE_TILE or grid.rows < 2 * SAMPLES:
            raise
        return _sampled(relation, grid, origins)


def _work_of(grid: TileGrid, counts: RowCounts) -> TileWork:
    by_row, by_column = strips(*counts.by_row), strips(*counts.by_column)
    return TileWork(NATURAL, grid.q_tile, grid.k_tile, by_row, by_column, counts.visible)


def _sampled(relation: Index, grid: TileGrid, origins: Origins) -> TileWork:
    """The tiles of some rows, each of which stands for those around it; columns are of the mean.

    The rows are unevenly apart, so that none of the relation's own steps is met alone.
    """
    ends = np.linspace(0, grid.rows, SAMPLES + 1).astype(np.int64)
    at = ends[:-1] + (np.arange(SAMPLES) * GOLDEN % 1 * np.diff(ends)).astype(np.int64)
    place = fold.place("q")
    own = [
        _counts(
            substitute(relation, {place: fold.add(place, fold.const(row * grid.q_tile))}),
            replace(grid, n_q=min(grid.q_tile, grid.n_q - row * grid.q_tile)),
            origins,
            MANY,
        )
        for row in at.tolist()
    ]
    times = np.diff(ends)
    rows = [np.array([one.by_row[i][0] for one in own]) for i in (0, 1)]
    columns = [np.sum([one.by_column[i] * n for one, n in zip(own, times.tolist(), strict=True)], 0) for i in (0, 1)]
    counts = [one.visible for one in own]
    visible = None
    if None not in counts:
        visible = sum(n * int(times[i]) for i, n in enumerate(counts) if n is not None)
    work = TileWork(
        NATURAL, grid.q_tile, grid.k_tile, strips(rows[0], rows[1], times), strips(columns[0], columns[1]), visible
    )
    return replace(work, sampled=SAMPLES)


def _counts(relation: Index, grid: TileGrid, origins: Origins, budget: int) -> RowCounts:
    resolved = resolve(relation, find_live_tiles(relation, grid, budget), origins)
    tiles, whole = resolved.tiles, resolved.tiles.kind == 0
    row, column = [], []
    for which in (whole, ~whole):
        count = tiles.count[which]
        row.append(np.bincount(tiles.row[which], weights=count, minlength=grid.rows).astype(np.int64))
        column.append(_covered(tiles.column[which], count, grid.columns))
    return RowCounts((row[0], row[1]), (column[0], column[1]), resolved.visible)


def _covered(start: Int64, count: Int64, columns: int) -> Int64:
    """How many stretches hold each column."""
    begins, ends = (np.bincount(at, minlength=columns + 1) for at in (start, start + count))
    return np.cumsum(begins - ends)[:columns].astype(np.int64)
