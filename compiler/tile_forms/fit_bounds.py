"""Loop bounds found by fitting the exact stretches of every tile row, and checked against all of them.

Rows of several stretches are cut along a line between these, found in the rows that have most; the two sides are fitted
on their own, so that sinks and a window come apart even where they touch. Where that is not enough, as by key tiles, of
which the sinks are seen by all queries, the rows are cut in two as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

import numpy as np

from attnc.compiler.tile_forms.arrays import Int64, alike
from attnc.compiler.tile_forms.bounds import Bounds, Interval, Line, has_no_overlap
from attnc.compiler.tile_forms.fit_lines import FREE, Asked, exactly, fit_line
from attnc.compiler.tile_forms.stretches import Stretches

MOST_INTERVALS = 6
MOST_ROW_CUTS = 2


LEAPS = 2


MOST_TRIES = 60
"""Sets that are fitted before a search ends: most of an irregular set's parts fit, but never all."""

LEAPS = 2


def fit_bounds(tiles: Stretches) -> Bounds | None:
    """The set as at most MOST_INTERVALS intervals a row, None where no such expressions are found."""
    for row_cuts in range(MOST_ROW_CUTS + 1):
        intervals = _Search().intervals(tiles, MOST_INTERVALS, row_cuts)
        if intervals is not None:
            bounds = Bounds(tiles.rows, tiles.columns, intervals)
            if has_no_overlap(bounds) and alike(bounds.enumerated(), tiles):
                return bounds
    return None


class _Search:
    """A search for intervals that gives up after MOST_TRIES."""

    def __init__(self) -> None:
        self._left = MOST_TRIES

    def intervals(self, tiles: Stretches, most: int, row_cuts: int) -> tuple[Interval, ...] | None:
        """At most so many; rows may be cut apart `row_cuts` times, one cut inside another."""
        if not len(tiles):
            return ()
        count = int(tiles.per_row.max())
        if count > most:
            return None
        if count == 1:
            interval = self._interval(tiles)
            if interval is not None:
                return (interval,)
        for left, right in _column_cuts(tiles, count):
            found = self._both(left, right, most, row_cuts)
            if found is not None or not self._left:
                return found
        if row_cuts and most > 1:
            for above, below in self._row_cuts(tiles, count):
                found = self._both(above, below, most, row_cuts - 1)
                if found is not None or not self._left:
                    return found
        return None

    def _both(self, a: Stretches, b: Stretches, most: int, row_cuts: int) -> tuple[Interval, ...] | None:
        first = self.intervals(a, most - 1, row_cuts)
        second = None if first is None else self.intervals(b, most - len(first), row_cuts)
        return None if first is None or second is None else (*first, *second)

    def _interval(self, tiles: Stretches) -> Interval | None:
        self._left = max(0, self._left - 1)
        return _interval(tiles) if self._left else None

    def _row_cuts(self, tiles: Stretches, count: int) -> Iterator[tuple[Stretches, Stretches]]:
        """The rows before a place, and those after it: at the largest leaps, or where one interval ceases to hold."""
        some = np.flatnonzero(tiles.per_row)
        for i in _leaps(tiles, some):
            yield _rows_cut(tiles, some[i + 1])
        if count == 1:
            yield _rows_cut(tiles, some[_first(len(some), lambda i: self._fits(_rows_cut(tiles, some[i])[1]))])
            head = _first(len(some), lambda i: not self._fits(_rows_cut(tiles, some[i])[0]))
            yield _rows_cut(tiles, some[head - 1])

    def _fits(self, tiles: Stretches) -> bool:
        return not len(tiles) or self._interval(tiles) is not None


def _column_cuts(tiles: Stretches, count: int) -> Iterator[tuple[Stretches, Stretches]]:
    """Two sides of a line between the stretches, both with fewer stretches a row."""
    for line in _lines_between(tiles, count):
        left, right = tiles.cut(np.clip(line.unclamped(np.arange(tiles.rows)), 0, tiles.columns))
        if max(left.per_row.max(), right.per_row.max()) < count:
            yield left, right


def _lines_between(tiles: Stretches, count: int) -> Iterator[Line]:
    """Lines along the gaps of the rows that have most stretches."""
    rows = np.flatnonzero(tiles.per_row == count)
    first = tiles.pointers[rows].astype(np.int64)
    for i in range(1, count):
        for values in (tiles.end[first + i - 1], tiles.start[first + i]):
            line = fit_line(exactly(rows, values.astype(np.int64)))
            if line is not None:
                yield line


def _leaps(tiles: Stretches, some: Int64) -> Int64:
    """The rows, by number among those that have tiles, after which the ends change most."""
    low = tiles.start[tiles.pointers[some]].astype(np.int64)
    high = tiles.end[tiles.pointers[some + 1] - 1].astype(np.int64)
    leap = np.abs(np.diff(low)) + np.abs(np.diff(high))
    return np.asarray(np.argsort(-leap, kind="stable")[:LEAPS])


def _rows_cut(tiles: Stretches, at: int) -> tuple[Stretches, Stretches]:
    return tiles.cut(np.where(np.arange(tiles.rows) < at, tiles.columns, 0))


def _first(n: int, holds: Callable[[int], bool]) -> int:
    """The first i < n from which it holds, n - 1 where it holds nowhere; once true it stays so."""
    return bisect_left(range(n - 1), True, key=holds)


def _interval(tiles: Stretches) -> Interval | None:
    """One interval for rows of one stretch or none, over all rows or else over those from the first to the last."""
    some = np.flatnonzero(tiles.per_row)
    starts, ends = (exactly(some, values.astype(np.int64)) for values in (tiles.start, tiles.end))
    start, end = fit_line(starts), fit_line(ends)
    if start is None or end is None:
        return None
    for first, last in dict.fromkeys([(0, tiles.rows), (int(some[0]), int(some[-1]) + 1)]):
        rows = np.arange(first, last)
        late = fit_line(_with_others(ends, rows, np.full(len(rows), -FREE), start.at(rows)))
        if late is not None:
            return Interval(start, late, first, last)
        early = fit_line(_with_others(starts, rows, end.at(rows), np.full(len(rows), FREE)))
        if early is not None:
            return Interval(early, end, first, last)
    return None


def _with_others(exact: Asked, rows: Int64, least: Int64, most: Int64) -> Asked:
    """What is asked exactly of some rows, and these bounds for the others."""
    at = exact.rows - rows[0]
    least[at] = most[at] = exact.least
    return Asked(rows, least, most)
