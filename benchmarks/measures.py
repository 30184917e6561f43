"""Values read from rows: speed over a rival, share of a bound, rank correlation, break-even length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from benchmark_part import Row
from goals import Measurement, Rows

Test = Callable[[Row], bool]
Read = Callable[[Rows], list[Measurement]]


def anything(row: Row) -> bool:
    """Accept every row."""
    return True


def timed(rows: Rows) -> Iterator[Row]:
    """Yield the rows with times, of every part."""
    return (row for part_rows in rows.values() for row in part_rows if "ms" in row)


def median(row: Row, name: str = "attnc") -> float | None:
    """Return the milliseconds of a contender, None if it did not run."""
    time = row["ms"].get(name)
    return None if time is None else float(time["median"])


def speedup(row: Row, rival: str) -> float | None:
    """Return how many times as fast as a rival attnc is, None if one of them did not run."""
    mine, theirs = median(row, "attnc"), median(row, rival)
    return None if mine is None or theirs is None else theirs / mine


def each(value: Callable[[Row], float | None], test: Test = anything) -> Read:
    """Return a reader of a value from every timed row that passes a test and has the value."""

    def read(rows: Rows) -> list[Measurement]:
        values = ((row, value(row)) for row in timed(rows) if test(row))
        return [Measurement(row["key"], x, row) for row, x in values if x is not None]

    return read


def over(rival: str, test: Test = anything) -> Read:
    """Return a reader of the speed over a rival."""
    return each(lambda row: speedup(row, rival), test)


def of_bound(row: Row) -> float | None:
    """Return the percentage reached of the speed over dense attention that the live tiles allow."""
    gain = speedup(row, "dense")
    return None if gain is None or "bound" not in row else 100 * gain / float(row["bound"])


def single(label: str, value: float | None) -> list[Measurement]:
    """Return one value for all rows, or no measurement if it is unknown."""
    return [] if value is None else [Measurement(label, value)]


def predictions(rows: Rows) -> list[tuple[Row, float, float]]:
    """Return the rows with predicted and measured milliseconds."""
    return [
        (row, float(row["predicted"]["attnc"]), float(row["ms"]["attnc"]["median"]))
        for row in timed(rows)
        if "predicted" in row
    ]


def error(row: Row) -> float | None:
    """Return the absolute error of a prediction in percent."""
    if "predicted" not in row:
        return None
    return abs(100 * (float(row["predicted"]["attnc"]) / float(row["ms"]["attnc"]["median"]) - 1))


def kendall(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Compute Kendall's tau: the share of concordant pairs of points less that of discordant ones, without ties."""
    signs = [
        math.copysign(1, (a - c) * (b - d)) for (a, b), (c, d) in itertools.combinations(pairs, 2) if a != c and b != d
    ]
    return sum(signs) / len(signs) if signs else None


def break_even(gains: Sequence[tuple[int, float]]) -> float | None:
    """Return the break-even length, interpolated between the two lengths around it on logarithmic scales.

    The least length if attnc is ahead at every length; infinity if it is behind at the last.
    """
    points = sorted((float(n), math.log(gain)) for n, gain in gains)
    if not points:
        return None
    if points[-1][1] < 0:
        return math.inf
    for (a, low), (b, high) in reversed(list(pairwise(points))):
        if low < 0 <= high:
            return math.exp(math.log(a) + (math.log(b) - math.log(a)) * -low / (high - low))
    return points[0][0]
