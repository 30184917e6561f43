"""Goals, their results, and the rows behind a goal, with the distance and the cause."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmark_part import Row, is_wrong

How = Literal["geometric mean", "median", "least", "most", "share", "95th percentile", "one value"]
"""The reduction from the values of rows to a goal's value; `share` is the percentage of ones among zeros and ones."""

Word = Literal["ahead", "behind", "not measured here"]

Rows = Mapping[str, Sequence[Row]]
"""Rows by part."""


@dataclass(frozen=True)
class Measurement:
    """One measured value for a goal, with the label and the row that it comes from."""

    label: str
    value: float
    row: Row = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Goal:
    """A target, its source, and how its value is read from result files."""

    key: str
    where: Literal["cpu", "gpu"]
    suite: str
    asks: str
    target: float
    floor: float | None
    least: bool
    unit: str
    source: str
    parts: tuple[str, ...]
    read: Callable[[Rows], list[Measurement]]
    how: How = "geometric mean"

    def met(self, value: float) -> bool:
        """Return whether a value reaches the target."""
        return value >= self.target if self.least else value <= self.target


@dataclass(frozen=True)
class Behind:
    """A row that misses the target: its value over the target's, and the cause, if known."""

    label: str
    value: float
    why: str


@dataclass(frozen=True)
class Verdict:
    """A goal with its measured value; `wrong` holds keys of rows with wrong results, which no speed makes up for."""

    goal: Goal
    value: float | None
    count: int
    behind: tuple[Behind, ...]
    wrong: tuple[str, ...]

    @property
    def word(self) -> Word:
        """Return "ahead", "behind" or "not measured here"."""
        if self.wrong:
            return "behind"
        if self.value is None:
            return "not measured here"
        return "ahead" if self.goal.met(self.value) else "behind"

    def line(self) -> str:
        """Return the verdict in one line."""
        goal = self.goal
        sign = "≥" if goal.least else "≤"
        value = "" if self.value is None else f": {shown(self.value, goal.unit)} ({goal.how} of {self.count})"
        wrong = f", {len(self.wrong)} results wrong" if self.wrong else ""
        return f"{goal.key:24} {self.word}{value}, asked {sign} {shown(goal.target, goal.unit)}{wrong}: {goal.asks}"


def shown(value: float, unit: str) -> str:
    """Format a value with its unit and three significant digits; "none" for an infinite break-even length."""
    if math.isinf(value):
        return "none"
    number = f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"
    return f"{number}{unit}" if unit in ("×", "") else f"{number} {unit}"


Why = Callable[[Goal, Measurement], str]


def verdict(goal: Goal, rows: Rows, why: Why) -> Verdict:
    """Return a goal's result; rows of other parts are ignored."""
    part_rows = {part: rows.get(part, ()) for part in goal.parts}
    wrong = tuple(
        f"{part}: {row['key']}" for part, part_results in part_rows.items() for row in part_results if is_wrong(row)
    )
    right = {part: [row for row in part_results if not is_wrong(row)] for part, part_results in part_rows.items()}
    values = goal.read(right)
    behind = [
        Behind(measurement.label, measurement.value, why(goal, measurement))
        for measurement in values
        if _misses(goal, measurement)
    ]
    behind.sort(key=lambda measurement: measurement.value, reverse=not goal.least)
    value = combined(goal.how, [measurement.value for measurement in values]) if values else None
    return Verdict(goal, value, len(values), tuple(behind), wrong)


def _misses(goal: Goal, measurement: Measurement) -> bool:
    return measurement.value < 1 if goal.how == "share" else not goal.met(measurement.value)


def combined(how: How, values: Sequence[float]) -> float:
    """Combine the values of several rows to one."""
    match how:
        case "geometric mean":
            return math.exp(statistics.fmean(map(math.log, values)))
        case "median":
            return statistics.median(values)
        case "least":
            return min(values)
        case "most":
            return max(values)
        case "share":
            return 100 * statistics.fmean(values)
        case "95th percentile":
            return sorted(values)[math.ceil(0.95 * len(values)) - 1]
        case "one value":
            (value,) = values
            return value
