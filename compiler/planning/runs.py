"""Runs: the stretches of adjacent live tiles of each tile row; runs with equal signatures share a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.hashing import Hash, Kinds, combine, kinds, mix
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.analysis.live_tiles import LiveTiles, TileGrid
from attnc.compiler.ir import Index
from attnc.compiler.planning.cpu_plan import Mask
from attnc.spec.source import Span

Int64 = NDArray[np.int64]

SHARED = 4
"""Minimum number of tiles or rows for which a shared mask pays."""

MAX_CLASS_ELEMENTS = 1 << 25
"""Maximum number of mask elements that are evaluated to resolve the classes of partial tiles."""


class TooManyClassesError(Exception):
    """Most partial tiles differ from each other, so that shared masks do not describe the relation."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Stretches of adjacent live tiles, sorted by row and column, as arrays with one entry for each run.

    Run i consists of the entries `first[i] ..= last[i]` of `tiles`. Equal signatures mean equal masks relative to the
    run's start, where the edges of the matrix clip alike.
    """

    tiles: LiveTiles
    first: Int64
    last: Int64
    signature: Hash

    def __len__(self) -> int:
        return len(self.first)

    @cached_property
    def row(self) -> Int64:
        """The tile row of each run."""
        return self.tiles.row[self.first]

    @cached_property
    def repeat(self) -> Int64:
        """The number of rows that repeat each run, every row one tile lower and `slope` tiles further right."""
        return self.tiles.repeat[self.first]

    @cached_property
    def slope(self) -> Int64:
        """The number of tiles by which a repeated run moves right from row to row."""
        return self.tiles.slope[self.first]

    @cached_property
    def column(self) -> Int64:
        """The first tile column of each run."""
        return self.tiles.column[self.first]

    @cached_property
    def end(self) -> Int64:
        """The tile column after the last column of each run."""
        return self.tiles.column[self.last] + self.tiles.count[self.last]

    @cached_property
    def partial(self) -> Int64:
        """The number of entries of partial tiles in each run."""
        before = np.cumsum(self.tiles.kind != 0)
        return np.asarray(before[self.last] - before[self.first] + (self.tiles.kind[self.first] != 0))

    def take(self, which: NDArray[np.bool_]) -> Runs:
        """Return the marked runs."""
        return Runs(self.tiles, self.first[which], self.last[which], self.signature[which])

    def parts(self, i: int) -> list[tuple[int, int, int]]:
        """Return the first column, the number of columns and the class (0: full) of each stretch of run i."""
        entries = slice(self.first[i], self.last[i] + 1)
        columns = (self.tiles.column[entries], self.tiles.count[entries], self.tiles.kind[entries])
        return list(zip(*(c.tolist() for c in columns), strict=True))


@dataclass(frozen=True, slots=True)
class ResolvedRuns:
    """Live tiles after the masks of their classes were evaluated: full classes become 0, empty ones are removed.

    `masks`: the mask of each remaining partial class. `visible`: the visible pairs; None if tiles of class EVALUATED,
    which are not evaluated here, remain.
    """

    tiles: LiveTiles
    masks: Mapping[int, Mask]
    visible: int | None

    @property
    def diagonal(self) -> Hash:
        """The classes whose mask is a lower triangle."""
        return np.array([kind for kind, mask in self.masks.items() if is_diagonal(mask)], dtype=np.uint64)


EVALUATED = np.uint64(1)
"""The class of partial tiles whose masks are evaluated as the pieces run."""


def resolve(
    relation: Index,
    tiles: LiveTiles,
    origins: Mapping[Index, Span],
    most: int | None = None,
    most_elements: int | None = None,
) -> ResolvedRuns:
    """Evaluate one tile of every class of partial tiles, or of the `most` most frequent classes only.

    Raises TooManyClassesError if that would evaluate more than `most_elements` mask elements (default:
    MAX_CLASS_ELEMENTS), and EvaluationError if the relation faults.
    """
    grid, classes = tiles.grid, kinds(tiles.kind)
    if most is not None:
        tiles = replace(tiles, kind=np.where(_frequent(tiles, classes, most), tiles.kind, EVALUATED))
        classes = kinds(tiles.kind)
    if len(classes.first) * grid.q_tile * grid.k_tile > (most_elements or MAX_CLASS_ELEMENTS):
        raise TooManyClassesError
    wide = not fits_word(relation, (0, grid.n_q), (0, grid.n_k))
    masks: dict[int, Mask] = {}
    members = np.bincount(classes.number, weights=tiles.repeat).astype(np.int64)
    visible = _full_elements(tiles)
    full, empty = (np.zeros(len(classes.first), dtype=np.bool_) for _ in range(2))
    for i, (entry, count) in enumerate(zip(classes.first.tolist(), members.tolist(), strict=True)):
        kind = int(tiles.kind[entry])
        if kind in (0, EVALUATED):
            continue
        rows, keys = grid.row_range(int(tiles.row[entry])), grid.key_range(int(tiles.column[entry]))
        mask = exact_evaluation.mask(relation, rows, keys, origins, wide=wide)
        visible += int(mask.sum()) * count
        full[i], empty[i] = mask.all(), not mask.any()
        if not (full[i] or empty[i]):
            masks[kind] = mask
    resolved = _reclassified(tiles, full[classes.number], empty[classes.number])
    return ResolvedRuns(resolved, masks, None if (resolved.kind == EVALUATED).any() else visible)


def _frequent(tiles: LiveTiles, classes: Kinds, max_classes: int) -> NDArray[np.bool_]:
    """Mark the full tiles and the tiles of the `max_classes` largest classes with at least SHARED tiles."""
    order = np.argsort(-classes.members, kind="stable")
    is_frequent = np.zeros(len(order), dtype=np.bool_)
    is_frequent[order[: max_classes + 1]] = True
    is_frequent &= classes.members >= SHARED
    return np.asarray(is_frequent[classes.number] | (tiles.kind == 0))


def _full_elements(tiles: LiveTiles) -> int:
    """Return the number of pairs in full tiles."""
    grid, full = tiles.grid, tiles.take(np.flatnonzero(tiles.kind == 0))
    heights = np.minimum((full.row + 1) * grid.q_tile, grid.n_q) - full.row * grid.q_tile
    starts = np.maximum(grid.k_origin + full.column * grid.k_tile, 0)
    ends = np.minimum(grid.k_origin + (full.column + full.count) * grid.k_tile, grid.n_k)
    return int((heights * (ends - starts) * full.repeat).sum())


def _reclassified(tiles: LiveTiles, full: NDArray[np.bool_], empty: NDArray[np.bool_]) -> LiveTiles:
    """Return the tiles with marked entries made full (class 0) or removed."""
    if full.any():
        tiles = replace(tiles, kind=np.where(full, np.uint64(0), tiles.kind))
    return tiles.take(np.flatnonzero(~empty)) if empty.any() else tiles


def find_runs(tiles: LiveTiles) -> Runs:
    """Return the runs of every tile row."""
    entries = _merged(tiles)
    starts = np.ones(len(entries.row), dtype=np.bool_)
    ends = entries.column + entries.count
    starts[1:] = (entries.row[1:] != entries.row[:-1]) | (entries.column[1:] != ends[:-1])
    starts[1:] |= entries.slope[1:] != entries.slope[:-1]
    return _runs(entries, starts)


def _merged(tiles: LiveTiles) -> LiveTiles:
    """Return the tiles with adjacent full stretches joined, so that equal rows have equal entries."""
    row, column, count, kind = tiles.row, tiles.column, tiles.count, tiles.kind
    starts = np.ones(len(row), dtype=np.bool_)
    adjacent = (row[1:] == row[:-1]) & (column[1:] == column[:-1] + count[:-1])
    adjacent &= tiles.slope[1:] == tiles.slope[:-1]
    starts[1:] = ~(adjacent & (kind[1:] == 0) & (kind[:-1] == 0))
    if starts.all():
        return tiles
    first = np.flatnonzero(starts)
    total = np.add.reduceat(count, first) if len(first) else count
    return replace(tiles.take(first), count=total)


def _runs(entries: LiveTiles, starts: NDArray[np.bool_]) -> Runs:
    """Return the runs that begin at the marked entries."""
    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(starts)) - 1
    if not len(first):
        return Runs(entries, first, first, entries.kind)
    origin = np.repeat(entries.column[first], last - first + 1)
    hashes = combine(entries.kind, mix(entries.column - origin), mix(entries.count))
    return Runs(entries, first, last, np.add.reduceat(hashes, first))


def run_mask(runs: Runs, i: int, resolved: ResolvedRuns) -> Mask:
    """Return the mask of run i over its rows and keys, assembled from the masks of its classes."""
    grid = resolved.tiles.grid
    start, stop = grid.row_range(int(runs.tiles.row[runs.first[i]]))
    columns = []
    for column, count, kind in runs.parts(i):
        width = grid.key_range(column + count - 1)[1] - grid.key_range(column)[0]
        columns.append(resolved.masks[kind] if kind else np.ones((stop - start, width), dtype=np.bool_))
    return np.concatenate(columns, axis=1)


LONG = 4
"""Minimum number of tiles of one class that become a separate piece in a run shared by fewer than SHARED rows."""


def split_runs(runs: Runs) -> Runs:
    """Cut runs that few rows share around their long stretches, so that the parts may be shared."""
    if not len(runs):
        return runs
    signatures = kinds(runs.signature)
    length, width, widest = runs.last - runs.first + 1, runs.end - runs.column, most_tiles(runs.tiles.grid)
    sharing = np.bincount(signatures.number, weights=runs.repeat)[signatures.number]
    cut = (length > 1) & ((sharing < SHARED) & (width > LONG) | (width > widest))
    if not cut.any():
        return runs
    inside = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    entries = runs.tiles.take(np.repeat(runs.first, length) + inside)
    starts = inside == 0
    changes = starts | np.append(True, entries.kind[1:] != entries.kind[:-1])
    stretch = np.cumsum(changes) - 1
    tiles = np.bincount(stretch, weights=entries.count)[stretch]
    long = np.repeat(cut, length) & (tiles >= LONG)
    starts |= changes & long
    starts[1:] |= changes[1:] & long[:-1]
    return _runs(entries, starts | _too_wide(entries, starts, widest))


def _too_wide(entries: LiveTiles, starts: NDArray[np.bool_], widest: int) -> NDArray[np.bool_]:
    """Mark the entries at which runs that begin at `starts` must be cut to stay within `widest` tiles."""
    first = np.flatnonzero(starts)
    origin = np.repeat(entries.column[first], np.diff(np.append(first, len(starts))))
    part = (entries.column - origin) // widest
    return np.append(False, part[1:] != part[:-1])


def most_tiles(grid: TileGrid) -> int:
    """Return the maximum number of tiles of a run with an assembled mask.

    Its mask has fewer elements than 1/4096 of all pairs, or than 2²⁰ if that is more.
    """
    most_elements = max(1 << 20, grid.n_q * grid.n_k // 4096) - 1
    return max(1, most_elements // (grid.q_tile * grid.k_tile))


def cut_at_steps(runs: Runs, resolved: ResolvedRuns) -> Runs:
    """Cut runs that few rows share and that end in a full stretch and a diagonal before that stretch.

    `runs` must be all runs of the tiles.
    """
    entries, last = runs.tiles, runs.last
    if not len(runs) or (entries.repeat > 1).any():
        return runs
    signatures = kinds(runs.signature)
    ends = (last - runs.first > 1) & (entries.kind[last - 1] == 0) & np.isin(entries.kind[last], resolved.diagonal)
    rare = ends & (signatures.members[signatures.number] < SHARED)
    if not rare.any():
        return runs
    starts = np.zeros(len(entries.row), dtype=np.bool_)
    starts[runs.first] = True
    starts[last[rare] - 1] = True
    return _runs(entries, starts)


def is_diagonal(mask: Mask) -> bool:
    """Whether row r sees exactly the columns ≤ r of a square."""
    rows, columns = mask.shape
    return rows == columns and bool(np.array_equal(mask, np.tri(rows, dtype=np.bool_)))


def staircases(runs: Runs, resolved: ResolvedRuns) -> tuple[list[Int64], NDArray[np.bool_]]:
    """Return groups of runs (by number) in adjacent rows, full from one column to the diagonal tile that ends them.

    A group has at least two rows; a row is in at most one group. The second result marks the runs in no group.
    """
    ends_diagonal = np.isin(runs.tiles.kind[runs.last], resolved.diagonal)
    steps = np.flatnonzero((runs.partial == 1) & ends_diagonal & (runs.repeat == 1)) if len(runs) else runs.first
    row = runs.row[steps]
    steps = steps[np.append(True, row[1:] != row[:-1])[: len(steps)]]
    row, column, end = runs.row[steps], runs.column[steps], runs.end[steps]
    follows = (row[1:] == row[:-1] + 1) & (column[1:] == column[:-1]) & (end[1:] == end[:-1] + 1)
    starts = np.flatnonzero(np.append(True, ~follows)[: len(steps)])
    stops = np.append(starts[1:], len(steps))
    long = np.flatnonzero(stops - starts > 1)
    groups = [steps[a:b] for a, b in zip(starts[long].tolist(), stops[long].tolist(), strict=True)]
    in_no_group = np.ones(len(runs), dtype=np.bool_)
    for group in groups:
        in_no_group[group] = False
    return groups, in_no_group
