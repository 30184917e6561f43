"""The plots of the report: speed over density, predicted over measured times, speed over length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnc.runtime.pictures.svg_parts import label, opening, px
from attnc.runtime.report.chart_svg import LogScale, log_scale, short

WIDTH, HEIGHT = 860, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 260, 72, 54
"""Margins around the plot; the names of series are at the right."""
STYLES = ("seen", "partial", "bar", "soft")
"""Colours of series, which also differ in shape."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points of one kind, connected if they are a line."""

    name: str
    points: Sequence[Point]
    joined: bool = False


@dataclass(frozen=True)
class Plot:
    """A plot with logarithmic axes. `lines`: dashed lines between two points, by name; `note` is below the title."""

    title: str
    note: str
    x_name: str
    y_name: str
    series: Sequence[Series]
    lines: Mapping[str, tuple[Point, Point]]
    square: bool = False
    """Whether both axes have the same scale."""

    def svg(self) -> str:
        """Return the plot as SVG."""
        x, y = self._scales()
        said = f"{self.x_name} against {self.y_name}. {self.note}"
        parts = opening(self.title, said, WIDTH, HEIGHT)
        parts += [label(LEFT, 28, self.title, "ink", 15, weight=600), label(LEFT, 46, self.note, "soft", 11)]
        parts += _axes(x, y) + self._names()
        for name, (first, last) in self.lines.items():
            parts += _dashed(name, (x.at(first[0]), y.at(first[1])), (x.at(last[0]), y.at(last[1])))
        for number, series in enumerate(self.series):
            parts += _drawn(series, number, x, y) + _legend(series.name, number)
        return "\n".join([*parts, "</svg>"]) + "\n"

    def _scales(self) -> tuple[LogScale, LogScale]:
        points = [point for series in self.series for point in series.points]
        points += [point for line in self.lines.values() for point in line]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        if self.square:
            xs = ys = xs + ys
        return (
            log_scale(xs, LEFT, WIDTH - RIGHT, room=1.2),
            log_scale(ys, HEIGHT - BOTTOM, TOP, room=1.2),
        )

    def _names(self) -> list[str]:
        return [
            label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, self.x_name, "ink", 12, anchor="middle"),
            label(LEFT - 6, TOP - 6, self.y_name, "ink", 12),
        ]


def _axes(x: LogScale, y: LogScale) -> list[str]:
    parts = []
    for tick in y.ticks():
        height = px(y.at(tick))
        parts.append(f'<path class="rule" d="M{px(x.start)} {height}H{px(x.end)}"/>')
        parts.append(label(x.start - 7, y.at(tick) + 4, _number(tick), "soft", 11, anchor="end"))
    for tick in x.ticks():
        height = px(x.at(tick))
        parts.append(f'<path class="rule" d="M{height} {px(y.end)}V{px(y.start)}"/>')
        parts.append(label(x.at(tick), y.start + 16, _number(tick), "soft", 11, anchor="middle"))
    return parts


def _number(value: float) -> str:
    return short(value) if value >= 1 else f"{value:g}"


def _dashed(name: str, first: Point, last: Point) -> list[str]:
    path = f"M{px(first[0])} {px(first[1])}L{px(last[0])} {px(last[1])}"
    line = f'<path class="line" d="{path}" stroke-dasharray="5 4" fill="none"/>'
    return [line, label(last[0] + 6, last[1] + 4, name, "soft", 11)]


def _drawn(one: Series, number: int, x: LogScale, y: LogScale) -> list[str]:
    points = [(x.at(a), y.at(b)) for a, b in one.points]
    parts = []
    if one.joined:
        path = "L".join(f"{px(a)} {px(b)}" for a, b in sorted(points))
        parts.append(f'<path class="line" d="M{path}" fill="none" stroke-width="1.2"/>')
    return parts + [_mark(a, b, number) for a, b in points]


def _mark(x: float, y: float, number: int) -> str:
    """Return a disc, a square, a diamond or a triangle."""
    shapes = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "M-3.5 -3.5h7v7h-7z", "M0 -5l5 5l-5 5l-5 -5z", "M0 -5l5 9h-10z")
    style, shape = STYLES[number % len(STYLES)], shapes[number % len(shapes)]
    return f'<path class="{style}" fill-opacity=".8" transform="translate({px(x)} {px(y)})" d="{shape}"/>'


def _legend(name: str, number: int) -> list[str]:
    x, y = WIDTH - RIGHT + 74, TOP + 8 + 20 * number
    return [_mark(x, y, number), label(x + 12, y + 4, name, "ink", 11)]


def reciprocal(low: float, high: float) -> tuple[Point, Point]:
    """Return the line of speedups equal to one over the density."""
    return (high, 1 / high), (low, 1 / low)


def diagonal(values: Sequence[float]) -> tuple[Point, Point]:
    """Return the line of equal values."""
    low, high = min(values), max(values)
    return (low, low), (high, high)


def level(value: float, xs: Sequence[float]) -> tuple[Point, Point]:
    """Return a horizontal line."""
    return (min(xs), value), (max(xs), value)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
