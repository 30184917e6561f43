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


LEAPS = 2


def fit_bounds(tiles: Stretches) -> Bounds | None:
    """The set as at most MOST_INTERVALS intervals a row, None where no such expressions are found."""
    for rows_apart in (False, True):
        intervals = _intervals(tiles, MOST_INTERVALS, rows_apart)
        if intervals is not None:
            bounds = Bounds(tiles.rows, tiles.columns, intervals)
            if has_no_overlap(bounds) and alike(bounds.enumerated(), tiles):
                return bounds
    return None


def _intervals(tiles: Stretches, most: int, rows_apart: bool) -> tuple[Interval, ...] | None:
    """Intervals for a set, `most` at most; `rows_apart`: the rows may be cut in two that are fitted on their own."""
    if not len(tiles):
        return ()
    count = int(tiles.per_row.max())
    if count > most:
        return None
    if count == 1:
        interval = _interval(tiles)
        if interval is not None:
            return (interval,)
    for left, right in _column_cuts(tiles, count):
        found = _both(left, right, most, rows_apart)
        if found is not None:
            return found
    if rows_apart and most > 1:
        for above, below in _row_cuts(tiles, count):
            found = _both(above, below, most, False)
            if found is not None:
                return found
    return None


def _both(a: Stretches, b: Stretches, most: int, rows_apart: bool) -> tuple[Interval, ...] | None:
    first = _intervals(a, most - 1, rows_apart)
    second = None if first is None else _intervals(b, most - len(first), rows_apart)
    return None if first is None or second is None else (*first, *second)


def _column_cuts(tiles: Stretches, count: int) -> Iterator[tuple[Stretches, Stretches]]:
    """Two sides of a line between the stretches, both with fewer stretches a row."""
    for line in _lines_between(tiles, count):
        left, right = tiles.cut(np.clip(line.unclamped(np.arange(tiles.rows)), 0, tiles.columns))
        if max(left.per_row.max(), right.per_row.max()) < count:
            yield left, right


def _row_cuts(tiles: Stretches, count: int) -> Iterator[tuple[Stretches, Stretches]]:
    """The rows before a place, and those after it: at the largest leaps, or where one interval ceases to hold."""
    some = np.flatnonzero(tiles.per_row)
    low = tiles.start[tiles.pointers[some]].astype(np.int64)
    high = tiles.end[tiles.pointers[some + 1] - 1].astype(np.int64)
    leap = np.abs(np.diff(low)) + np.abs(np.diff(high))
    for i in np.argsort(-leap, kind="stable")[:LEAPS]:
        yield _rows_cut(tiles, some[i + 1])
    if count == 1:
        yield _rows_cut(tiles, some[_first(len(some), lambda i: _fits(_rows_cut(tiles, some[i])[1]))])
        yield _rows_cut(tiles, some[_first(len(some), lambda i: not _fits(_rows_cut(tiles, some[i])[0])) - 1])


def _rows_cut(tiles: Stretches, at: int) -> tuple[Stretches, Stretches]:
    return tiles.cut(np.where(np.arange(tiles.rows) < at, tiles.columns, 0))


def _fits(tiles: Stretches) -> bool:
    return not len(tiles) or _interval(tiles) is not None


def _first(n: int, holds: Callable[[int], bool]) -> int:
    """The first i < n from which it holds, n - 1 where it holds nowhere; once true it stays so."""
    return bisect_left(range(n - 1), True, key=holds)


def _lines_between(tiles: Stretches, count: int) -> Iterator[Line]:
    """Lines along the gaps of the rows that have most stretches."""
    rows = np.flatnonzero(tiles.per_row == count)
    first = tiles.pointers[rows].astype(np.int64)
    for i in range(1, count):
        for values in (tiles.end[first + i - 1], tiles.start[first + i]):
            line = fit_line(exactly(rows, values.astype(np.int64)))
            if line is not None:
                yield line


def _interval(tiles: Stretches) -> Interval | None:
    """One interval for rows of one stretch or none, over all rows or else over those from the first to the last."""
    some = np.flatnonzero(tiles.per_row)
    start, end = tiles.start.astype(np.int64), tiles.end.astype(np.int64)
    for first, last in dict.fromkeys([(0, tiles.rows), (int(some[0]), int(some[-1]) + 1)]):
        rows = np.arange(first, last)
        lines = _start_then_end(rows, some, start, end) or _end_then_start(rows, some, start, end)
        if lines is not None:
            return Interval(*lines, first, last)
    return None


def _start_then_end(rows: Int64, some: Int64, start: Int64, end: Int64) -> tuple[Line, Line] | None:
    """Lines for the rows in `some`, and in others an end that is not past the start."""
    low = fit_line(exactly(some, start))
    if low is None:
        return None
    least, most = np.full(len(rows), -FREE), low.at(rows)
    least[some - rows[0]] = most[some - rows[0]] = end
    high = fit_line(Asked(rows, least, most))
    return None if high is None else (low, high)


def _end_then_start(rows: Int64, some: Int64, start: Int64, end: Int64) -> tuple[Line, Line] | None:
    high = fit_line(exactly(some, end))
    if high is None:
        return None
    least, most = high.at(rows), np.full(len(rows), FREE)
    least[some - rows[0]] = most[some - rows[0]] = start
    low = fit_line(Asked(rows, least, most))
    return None if low is None else (low, high)
