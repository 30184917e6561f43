"""Count the live tiles of a relation in natural order: all tiles, a few repeating rows, or a sample of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from attnc.compiler.analysis.live_tiles import TileGrid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index, fold
from attnc.compiler.ir.rewrite import substitute
from attnc.compiler.planning.runs import resolve
from attnc.compiler.planning.strips import Int64, strips
from attnc.compiler.planning.tile_work import NATURAL, TileWork
from attnc.compiler.simulation.shifted_rows import RowCounts, count_shifted, find_repetition
from attnc.spec.source import Span

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
