"""Parts shared by all charts: a labelled SVG, a line of text, axes and their labelled values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, floor, log

from attnc.runtime.report.markup import Markup, element


def figure(name: str, title: str, description: str, width: float, height: float, /, *parts: str) -> Markup:
    """Return an SVG with its title and `description`, a `desc` element that sliders may move."""
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        description,
        *parts,
        id=name,
        class_="chart",
        role="img",
        aria_labelledby=f"{name}-title",
        viewBox=f"0 0 {width:g} {height:g}",
    )


def hatch(name: str, step: int, *parts: str) -> Markup:
    """Return a pattern of slanted strokes, `step` pixels apart."""
    more = {"patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
    return element("pattern", *parts, id=name, width=step, height=step, **more)


def label(x: float, y: float, text: str, style: str = "", *, anchor: str | None = None) -> Markup:
    """Return a line of text at (x, y). `anchor`: middle or end, the part of the text that is at x."""
    return element("text", text, class_=style or None, x=x, y=y, text_anchor=anchor)


def axes(x: LogScale, y: LogScale, x_text: Callable[[float], str], y_text: Callable[[float], str]) -> list[Markup]:
    """Return grid lines with their values, left of and below the plot."""
    parts = []
    for tick in y.ticks():
        pixel = y.at(tick)
        parts.append(element("line", class_="grid", x1=x.start, x2=x.end, y1=pixel, y2=pixel))
        parts.append(label(x.start - 7, pixel + 4, y_text(tick), "quiet small", anchor="end"))
    for tick in x.ticks():
        pixel = x.at(tick)
        parts.append(element("line", class_="grid", x1=pixel, x2=pixel, y1=y.end, y2=y.start))
        parts.append(label(pixel, y.start + 16, x_text(tick), "quiet small", anchor="middle"))
    parts.append(element("path", class_="axis", d=f"M{x.start:g} {y.end:g}V{y.start:g}H{x.end:g}"))
    return parts


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
