"""The ladder as bars: each bound, its share of the bound above, and the cause of the loss."""

from __future__ import annotations

from math import inf

from attnc.compiler.simulation.print_simulation import times
from attnc.compiler.simulation.simulation import CHOSEN_RUNGS, RungName, Simulation
from attnc.runtime.pictures.svg_parts import shortened
from attnc.runtime.report.chart_svg import figure, label
from attnc.runtime.report.markup import Markup, SliderFrame, element, joined, px

WIDTH, ROW, LEFT, BAR = 1040, 54, 128, 620
TOP = 18
LONGEST = 130
"""The maximum number of characters shown of a loss; the description contains the whole text."""

MEANING: dict[RungName, str] = {
    "element": "visible pairs",
    "tile": "whole tiles",
    "balanced": "longest worker",
    "attended": "selected pairs",
    "listed": "with its lists",
    "predicted": "with all costs",
}


def ladder_frame(simulation: Simulation) -> SliderFrame:
    """Return the bars of the ladder; widths are shares of the longest finite bar, an infinite bound has full width."""
    rungs = simulation.rungs
    top = max([rung.speedup for rung in rungs if rung.speedup < inf] + [1.0])
    texts: dict[str, str] = {}
    shapes: dict[str, dict[str, str]] = {}
    above = None
    for rung in rungs:
        width = BAR if rung.speedup == inf else max(BAR * rung.speedup / top, 1.0)
        shapes[f"ladder-{rung.name}"] = {"width": px(width)}
        shapes[f"ladder-{rung.name}-at"] = {"x": px(LEFT + width + 10)}
        texts[f"ladder-{rung.name}"] = times(rung.speedup) + _share_of_above(rung.speedup, above)
        texts[f"ladder-{rung.name}-lost"] = shortened(rung.lost_to, LONGEST)
        texts[f"ladder-{rung.name}-lost-in-full"] = rung.lost_to
        above = rung.speedup
    unit_x = LEFT + BAR / top
    shapes["ladder-one"] = {"x1": px(unit_x), "x2": px(unit_x)}
    shapes["ladder-one-at"] = {"x": px(max(unit_x, LEFT + 1))}
    spoken = "; ".join(f"{rung.name} {times(rung.speedup)}: {rung.lost_to}" for rung in rungs)
    texts["ladder-said"] = f"Speedups over dense attention at its ideal. {spoken}."
    return SliderFrame(texts, shapes)


def _share_of_above(speedup: float, above: float | None) -> str:
    if above is None or inf in (speedup, above) or not above:
        return ""
    return f"  {speedup / above:.0%} of the rung above"


def draw_ladder(frame: SliderFrame) -> Markup:
    """Draw the chart."""
    names = [name for name in CHOSEN_RUNGS if f"ladder-{name}" in frame.texts]
    height = TOP + ROW * len(names) + 22
    parts = [
        element("line", class_="edge", x1=LEFT, x2=LEFT, y1=TOP - 8, y2=height - 22),
        frame.shape("line", "ladder-one", class_="dashed", y1=TOP - 8, y2=height - 22),
        frame.shape("text", "ladder-one-at", "1×: dense at its ideal", class_="quiet small", y=height - 6),
    ]
    for i, name in enumerate(names):
        y = TOP + ROW * i
        style = "measure" if name == "predicted" else "measure bound"
        parts += [
            label(0, y + 12, name, "strong"),
            label(0, y + 28, MEANING[name], "quiet small"),
            frame.shape("rect", f"ladder-{name}", class_=style, x=LEFT, y=y, height=16, rx=2),
            frame.shape(
                "text", f"ladder-{name}-at", frame.text("tspan", f"ladder-{name}"), class_="strong number", y=y + 13
            ),
            frame.text("text", f"ladder-{name}-lost", class_="quiet halo", x=LEFT + 6, y=y + 33),
        ]
    chart = figure("ladder-chart", "Ladder of bounds", frame.text("desc", "ladder-said"), WIDTH, height, *parts)
    return joined([chart, _in_words(frame, names)])


def _in_words(frame: SliderFrame, names: list[RungName]) -> Markup:
    """Return the ladder as a list, which narrow screens show instead of the chart, with all texts in full."""
    parts = []
    for name in names:
        parts += [
            element("dt", name, ": ", frame.text("span", f"ladder-{name}")),
            frame.text("dd", f"ladder-{name}-lost-in-full", class_="quiet"),
        ]
    return element("dl", *parts, class_="narrow")
