"""Exact numbers of visible pairs and live tiles, by tiles: no mask of a whole matrix is made."""

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
"""Undecided boxes of one level at most."""

MOST_CLASSES = 1 << 10
"""Kinds of partial tiles that are looked at."""

SHORT = 384
"""Lengths up to which the whole mask is no more work than tiles."""


class UncountableError(Exception):
    """Counting would take too long, or the relation has no value somewhere."""


@dataclass(frozen=True, slots=True)
class Count:
    """Visible pairs and live tiles."""

    pairs: int
    tiles: int


def count(relation: Index, n: int, tile: int) -> Count:
    """The counts of a specialised relation among n tokens.

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
    """Counts for every length up to one, of a relation that does not depend on the length.

    `pairs[n]` of n tokens; `tiles[i]` of i whole tile rows. `whole[i]`: tile row and column i, and where they meet,
    have the same live tiles however few of their rows and columns there are: then `tiles[i + 1]` holds for those too.
    """

    tile: int
    pairs: Int64
    tiles: Int64
    whole: NDArray[np.bool_]


def counts(relation: Index, n: int, tile: int) -> Counts:
    """The counts of all lengths up to n, which is a multiple of the tile, from one look at the longest.

    Raises UncountableError.
    """
    found = _resolved(relation, n, tile)
    shells = _Shells(n // tile, tile)
    shells.add_full(found.tiles)
    for kind, mask in found.masks.items():
        at = np.flatnonzero(found.tiles.kind == np.uint64(kind))
        shells.add_partial(found.tiles.row[at], found.tiles.column[at], mask)
    pairs, tiles = (np.concatenate([[0], np.cumsum(x)]) for x in (shells.pairs.ravel(), shells.tiles))
    return Counts(tile, pairs, tiles, shells.whole)


class _Shells:
    """The pairs that each further token, and each further tile row with its column, adds."""

    def __init__(self, rows: int, tile: int) -> None:
        self.pairs = np.zeros((rows, tile), dtype=np.int64)
        self.tiles = np.zeros(rows, dtype=np.int64)
        self.whole = np.ones(rows, dtype=np.bool_)
        self._tile = tile

    def add_full(self, tiles: LiveTiles) -> None:
        """The full tiles."""
        at = np.flatnonzero(tiles.kind == 0)
        row, column, count = (np.repeat(x[at], tiles.repeat[at]) for x in (tiles.row, tiles.column, tiles.count))
        below = np.clip(row - column, 0, count)
        on = (column <= row) & (row < column + count)
        np.add.at(self.pairs, row, (below * self._tile)[:, None])
        np.add.at(self.pairs, row[on], 2 * np.arange(self._tile) + 1)
        np.add.at(self.tiles, row, below + on)
        above = count - below - on
        column = np.repeat(column + count - above, above)
        right = column + np.arange(len(column)) - np.repeat(np.cumsum(above) - above, above)
        np.add.at(self.pairs, right, self._tile)
        np.add.at(self.tiles, right, 1)

    def add_partial(self, row: Int64, column: Int64, mask: NDArray[np.bool_]) -> None:
        """All tiles with a mask."""
        rows, columns = mask.sum(axis=1), mask.sum(axis=0)
        ways = (
            (row[column < row], rows, mask[0].any()),
            (column[column > row], columns, mask[:, 0].any()),
            (row[column == row], np.tril(mask).sum(axis=1) + np.triu(mask, 1).sum(axis=0), mask[0, 0]),
        )
        for at, added, at_once in ways:
            np.add.at(self.pairs, at, added)
            np.add.at(self.tiles, at, 1)
            if not at_once:
                self.whole[at] = False
