"""Axes: the position of a value, and the values that are labelled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, floor, log

MOST_TICKS = 7


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis from `low` at `start` to `high` at `end`, in pixels; ticks are powers of `base`."""

    low: float
    high: float
    start: float
    end: float
    base: int = 10

    def at(self, value: float) -> float:
        """Return the position of a value in pixels; values beyond an end are at that end."""
        inside = min(max(value, self.low), self.high)
        return self.start + (self.end - self.start) * log(inside / self.low) / log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Return powers of the base, or of a power of it; on a short decimal axis also 2 and 5 times them.

        At most `MOST_TICKS`.
        """
        first = ceil(log(self.low, self.base) - 1e-9)
        last = floor(log(self.high, self.base) + 1e-9)
        if self.base == 10 and last - first < 2:
            finer = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
            inside = [tick for tick in finer if self.low <= tick <= self.high]
            if 2 <= len(inside) <= MOST_TICKS:
                return inside
        step = max(1, ceil((last - first + 1) / MOST_TICKS))
        return [float(self.base) ** e for e in range(first, last + 1, step)]


def log_scale(values: Iterable[float], start: float, end: float, *, base: int = 10, room: float = 1.0) -> LogScale:
    """Return the axis of positive values, with a factor of `room` on both sides; of one value, a decade around it."""
    positive = [value for value in values if value > 0]
    low, high = min(positive, default=1.0) / room, max(positive, default=1.0) * room
    if high / low < base:
        middle = (low * high) ** 0.5
        low, high = middle / base, middle * base
    return LogScale(low, high, start, end, base)


def short(number: float) -> str:
    """Return a length in a few characters: in powers of 1024 where it is a multiple, as in 16k, else in full."""
    whole = round(number)
    for factor, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if whole >= factor and whole % factor == 0:
            return f"{whole // factor:,}{letter}"
    return f"{whole:,}" if abs(number - whole) < 1e-9 * max(abs(number), 1) else f"{number:g}"
