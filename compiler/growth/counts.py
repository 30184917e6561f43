"""Exact numbers of visible pairs and live tiles, counted tile by tile without a mask of the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.live_tiles import LiveTiles, TileGrid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index
from attnc.compiler.planning.runs import ResolvedRuns, TooManyClassesError, resolve
from attnc.spec.errors import EvaluationError

Int64 = NDArray[np.int64]

BUDGET = 1 << 18
"""Maximum number of undecided boxes per level."""

MOST_CLASSES = 1 << 10
"""Maximum number of classes of partial 128 × 128 tiles to evaluate."""

SHORT = 384
"""Maximum length in tokens at which evaluating the whole mask is no more work than finding tiles."""


class UncountableError(Exception):
    """Raised where counting would take too long, or the relation has no value at some pair."""


@dataclass(frozen=True, slots=True)
class Count:
    """The numbers of visible pairs and live tiles."""

    pairs: int
    tiles: int


def count(relation: Index, n: int, tile: int) -> Count:
    """Count the visible pairs and live tiles of a specialised relation over n tokens.

    Raises UncountableError.
    """
    if n <= SHORT:
        return _count_short(relation, n, tile)
    resolved = _resolved(relation, n, tile)
    assert resolved.visible is not None
    return Count(resolved.visible, resolved.tiles.full + resolved.tiles.partial)


def _count_short(relation: Index, n: int, tile: int) -> Count:
    try:
        mask = exact_evaluation.mask(relation, (0, n), (0, n))
    except EvaluationError as error:
        raise UncountableError from error
    starts = np.arange(0, n, tile)
    live = np.logical_or.reduceat(np.logical_or.reduceat(mask, starts, axis=0), starts, axis=1)
    return Count(int(mask.sum()), int(live.sum()))


def _resolved(relation: Index, n: int, tile: int) -> ResolvedRuns:
    try:
        tiles = find_live_tiles(relation, TileGrid(n, n, tile, tile), BUDGET)
        if len(np.unique(tiles.kind)) * tile * tile > MOST_CLASSES * 128 * 128:
            raise UncountableError
        return resolve(relation, tiles, {})
    except (TooManyTilesError, TooManyClassesError, EvaluationError) as error:
        raise UncountableError from error


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """Counts at every length up to a longest one, for a relation that does not depend on the length.

    `pairs[n]`: the visible pairs of n tokens. `tiles[i]`: the live tiles of i whole tile rows. `whole[i]`: a cut tile
    row i and a cut tile column i have as many live tiles as whole ones, so that `tiles[i + 1]` holds for cut ones too.
    """

    tile: int
    pairs: Int64
    tiles: Int64
    whole: NDArray[np.bool_]


def counts(relation: Index, n: int, tile: int) -> Counts:
    """Return the counts at all lengths up to n, a multiple of the tile, from one analysis at length n.

    Raises UncountableError.
    """
    resolved = _resolved(relation, n, tile)
    shells = _Shells(n // tile, tile)
    shells.add_full(resolved.tiles)
    for kind, mask in resolved.masks.items():
        class_tiles = np.flatnonzero(resolved.tiles.kind == np.uint64(kind))
        shells.add_partial(resolved.tiles.row[class_tiles], resolved.tiles.column[class_tiles], mask)
    pairs, tiles = (np.concatenate([[0], np.cumsum(x)]) for x in (shells.pairs.ravel(), shells.tiles))
    return Counts(tile, pairs, tiles, shells.whole)


class _Shells:
    """The pairs that each token adds, and the live tiles that each tile row adds together with its tile column."""

    def __init__(self, rows: int, tile: int) -> None:
        self.pairs = np.zeros((rows, tile), dtype=np.int64)
        self.tiles = np.zeros(rows, dtype=np.int64)
        self.whole = np.ones(rows, dtype=np.bool_)
        self._tile = tile

    def add_full(self, tiles: LiveTiles) -> None:
        """Add the full tiles."""
        full = np.flatnonzero(tiles.kind == 0)
        row, column, count = (np.repeat(x[full], tiles.repeat[full]) for x in (tiles.row, tiles.column, tiles.count))
        below = np.clip(row - column, 0, count)
        on_diagonal = (column <= row) & (row < column + count)
        np.add.at(self.pairs, row, (below * self._tile)[:, None])
        np.add.at(self.pairs, row[on_diagonal], 2 * np.arange(self._tile) + 1)
        np.add.at(self.tiles, row, below + on_diagonal)
        above = count - below - on_diagonal
        column = np.repeat(column + count - above, above)
        above_column = column + np.arange(len(column)) - np.repeat(np.cumsum(above) - above, above)
        np.add.at(self.pairs, above_column, self._tile)
        np.add.at(self.tiles, above_column, 1)

    def add_partial(self, row: Int64, column: Int64, mask: NDArray[np.bool_]) -> None:
        """Add the partial tiles that share a mask."""
        rows, columns = mask.sum(axis=1), mask.sum(axis=0)
        placements = (
            (row[column < row], rows, mask[0].any()),
            (column[column > row], columns, mask[:, 0].any()),
            (row[column == row], np.tril(mask).sum(axis=1) + np.triu(mask, 1).sum(axis=0), mask[0, 0]),
        )
        for shell, added, first_is_live in placements:
            np.add.at(self.pairs, shell, added)
            np.add.at(self.tiles, shell, 1)
            if not first_is_live:
                self.whole[shell] = False
