"""Tiles as loop bounds: closed expressions in the tile row, for as many intervals of columns as a row has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnc.compiler.tile_forms.arrays import Int64
from attnc.compiler.tile_forms.stretches import Stretches, stretches


@dataclass(frozen=True, slots=True)
class Line:
    """`clamp(shift + scale · ((slope · r + offset) // divisor), low, high)` of a tile row r.

    The offset is `offsets[r % len(offsets)]`; None leaves a side open.
    """

    slope: int
    offsets: tuple[int, ...]
    divisor: int = 1
    scale: int = 1
    shift: int = 0
    low: int | None = None
    high: int | None = None

    def at(self, rows: Int64) -> Int64:
        """Its value in each of some rows."""
        value = self.unclamped(rows)
        value = value if self.low is None else np.maximum(value, self.low)
        return value if self.high is None else np.minimum(value, self.high)

    def unclamped(self, rows: Int64) -> Int64:
        """Its value without `low` and `high`."""
        offset = np.array(self.offsets, dtype=np.int64)[rows % len(self.offsets)]
        return np.asarray(self.shift + self.scale * ((self.slope * rows + offset) // self.divisor))

    @property
    def numbers(self) -> int:
        """How many numbers say it."""
        return 6 + len(self.offsets)

    def __str__(self) -> str:
        text = self._scaled(self._quotient())
        if self.low is not None and self.high is not None:
            return f"clamp({text}, {self.low}, {self.high})"
        text = text if self.low is None else f"max({text}, {self.low})"
        return text if self.high is None else f"min({text}, {self.high})"

    def _quotient(self) -> str:
        offset: int | str = self.offsets[0] if len(self.offsets) == 1 else f"{[*self.offsets]}[r % {len(self.offsets)}]"
        if not self.slope:
            return str(offset) if self.divisor == 1 else f"{offset} // {self.divisor}"
        text = _added({1: "r", -1: "-r"}.get(self.slope, f"{self.slope} * r"), offset)
        if self.divisor == 1:
            return text
        return f"({text}) // {self.divisor}" if " " in text else f"{text} // {self.divisor}"

    def _scaled(self, text: str) -> str:
        if self.scale == 1:
            return _added(text, self.shift)
        return _added(f"{self.scale} * ({text})", self.shift)


def _added(text: str, number: int | str) -> str:
    if isinstance(number, str):
        return f"{text} + {number}"
    return text if not number else f"{text} + {number}" if number > 0 else f"{text} - {-number}"


@dataclass(frozen=True, slots=True)
class Interval:
    """The columns [start, end) of every tile row in [first, last), none in other rows or where end ≤ start."""

    start: Line
    end: Line
    first: int
    last: int

    @property
    def numbers(self) -> int:
        """How many numbers say it."""
        return 2 + self.start.numbers + self.end.numbers

    def at(self, rows: Int64) -> tuple[Int64, Int64]:
        """Start and end in each of some rows."""
        inside = (rows >= self.first) & (rows < self.last)
        start = self.start.at(rows)
        return start, np.where(inside, np.maximum(self.end.at(rows), start), start)


@dataclass(frozen=True, slots=True)
class Bounds:
    """A set of tiles as intervals of columns, the same expressions for every tile row; no two share a tile."""

    rows: int
    columns: int
    intervals: tuple[Interval, ...]

    @property
    def bytes(self) -> int:
        """Their size, four bytes a number."""
        return 4 * sum(interval.numbers for interval in self.intervals)

    def enumerated(self) -> Stretches:
        """The tiles as stretches."""
        rows = np.arange(self.rows)
        ends = [interval.at(rows) for interval in self.intervals]
        row = np.tile(rows, len(ends))
        start, end = (np.concatenate([pair[i] for pair in ends]) if ends else row for i in (0, 1))
        order = np.lexsort((start, row))
        return stretches(self.rows, self.columns, row[order], start[order], end[order])

    def __str__(self) -> str:
        lines = []
        for interval in self.intervals:
            whole = (interval.first, interval.last) == (0, self.rows)
            where = "" if whole else f" for r in {interval.first}..{interval.last}"
            lines.append(f"[{interval.start}, {interval.end}){where}")
        return "\n".join(lines) or "nothing"


def has_no_overlap(bounds: Bounds) -> bool:
    """Whether no tile is in two of the intervals."""
    rows = np.arange(bounds.rows)
    total = sum(int((end - start).sum()) for start, end in (interval.at(rows) for interval in bounds.intervals))
    return total == bounds.enumerated().tiles
