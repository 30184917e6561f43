"""Parts shared by all charts: a labelled SVG, a line of text, axes."""

from __future__ import annotations

from collections.abc import Callable

from attnc.runtime.report.markup import Markup, element
from attnc.runtime.report.scales import LogScale


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
