"""Speedups over the length or over a parameter: where a pattern starts to pay off, and how its bounds behave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from attnc.compiler.simulation.print_simulation import times
from attnc.compiler.simulation.simulation import RungName, Simulation
from attnc.runtime.report.chart_svg import LogScale, axes, figure, label, log_scale, short
from attnc.runtime.report.markup import Markup, SliderFrame, element, px
from attnc.runtime.report.point import ReportPoint, length_of

WIDTH, HEIGHT = 520, 340
LEFT, TOP, RIGHT, BOTTOM = 66, 40, 500, 284
SERIES: tuple[RungName, ...] = ("element", "tile", "predicted")

Curve = Mapping[int, Simulation]


@dataclass(frozen=True)
class SweepCurves:
    """Curves along `axis`, one for each stop of the slider that does not move along it.

    `moves`: whether a slider moves along the axis, and with it a marker.
    """

    axis: str
    along_length: bool
    moves: bool
    curves: Mapping[int | None, Curve]
    x: LogScale
    y: LogScale

    def place(self, point: ReportPoint) -> int | None:
        """Return the position of a point on the axis."""
        return point.length if self.along_length else point.value

    def curve(self, point: ReportPoint) -> Curve:
        """Return the curve of a point."""
        if not self.moves:
            return next(iter(self.curves.values()))
        return self.curves.get(point.value if self.along_length else point.length, {})


def sweep_of(
    points: Sequence[ReportPoint],
    start: ReportPoint,
    swept: Sequence[Simulation],
    name: str | None,
    parameter: str | None,
) -> SweepCurves | None:
    """Return the curves of all points and of a sweep from `start`; None where no curve has two points.

    `name`: the parameter that the sweep changes, None for the length; `parameter`: the one that the points change.
    """
    along_length, moves = name is None, name is None or name == parameter
    curves: dict[int | None, dict[int, Simulation]] = {}
    for point in points if moves else ():
        keys = (point.length, point.value) if along_length else (point.value, point.length)
        axis_value, curve_key = keys
        if axis_value is not None and axis_value >= 1:
            curves.setdefault(curve_key, {})[axis_value] = point.simulation
    start_key = (start.value if along_length else start.length) if moves else None
    for simulation in swept:
        axis_place = length_of(simulation) if name is None else simulation.params.get(name)
        if isinstance(axis_place, int) and not isinstance(axis_place, bool) and axis_place >= 1:
            curves.setdefault(start_key, {})[axis_place] = simulation
    ordered = {key: dict(sorted(curve.items())) for key, curve in curves.items()}
    if max(map(len, ordered.values()), default=0) < 2:
        return None
    places = [axis_value for curve in ordered.values() for axis_value in curve]
    speedups = [s for curve in ordered.values() for simulation in curve.values() for s in _finite(simulation)]
    x = log_scale(places, LEFT + 6, RIGHT - 6, base=2)
    y = log_scale([1.0, *speedups], BOTTOM, TOP, room=1.3)
    return SweepCurves(name or "tokens", along_length, moves, ordered, x, y)


def _finite(simulation: Simulation) -> Iterable[float]:
    return (s for s in (simulation.rung(name).speedup for name in SERIES) if 0 < s < inf)


def sweep_frame(sweep: SweepCurves, point: ReportPoint) -> SliderFrame:
    """Return the curves of the point, and its marker."""
    curve = sweep.curve(point)
    shapes = {f"sweep-{name}": {"d": _path(sweep, curve, name)} for name in SERIES}
    axis_value = sweep.place(point) if sweep.moves else None
    x = px(sweep.x.at(axis_value)) if axis_value is not None and axis_value >= 1 else None
    shapes["sweep-marker"] = {"x1": x or "0", "x2": x or "0", "visibility": "visible" if x else "hidden"}
    mark = (
        f"at {short(axis_value)} {_unit(sweep)}: {times(point.simulation.rung('predicted').speedup)} predicted"
        if axis_value
        else ""
    )
    spoken = "; ".join(
        f"{short(place)}: element {times(simulation.rung('element').speedup)}, "
        f"tile {times(simulation.rung('tile').speedup)}, "
        f"predicted {times(simulation.rung('predicted').speedup)}"
        for place, simulation in curve.items()
    )
    texts = {
        "sweep-mark": mark,
        "sweep-said": f"Speedups over dense attention at its ideal, by {sweep.axis}. {spoken}.",
    }
    return SliderFrame(texts, shapes)


def _unit(sweep: SweepCurves) -> str:
    return "tokens" if sweep.along_length else f"= {sweep.axis}"


def _path(sweep: SweepCurves, curve: Curve, name: RungName) -> str:
    """Return a line through the finite speedups, interrupted where there is no work."""
    path, pen = "", "M"
    for place, simulation in curve.items():
        speedup = simulation.rung(name).speedup
        if not 0 < speedup < inf:
            pen = "M"
            continue
        path += f"{pen}{px(sweep.x.at(place))} {px(sweep.y.at(speedup))}"
        pen = "L"
    return path


def draw_sweep(sweep: SweepCurves, frame: SliderFrame) -> Markup:
    """Draw the chart."""
    even = sweep.y.at(1.0)
    return figure(
        "sweep-chart",
        f"Speedup against {sweep.axis}",
        frame.text("desc", "sweep-said"),
        WIDTH,
        HEIGHT,
        element("defs", *map(_symbol, SERIES)),
        *axes(sweep.x, sweep.y, short, _times),
        element("line", class_="even", x1=LEFT, x2=RIGHT, y1=even, y2=even),
        label(RIGHT, even - 5, "dense at its ideal", "quiet small", anchor="end"),
        frame.shape("line", "sweep-marker", class_="dashed", y1=TOP, y2=BOTTOM),
        *(
            frame.shape(
                "path",
                f"sweep-{name}",
                class_=f"series series-{name}",
                marker_start=f"url(#symbol-{name})",
                marker_mid=f"url(#symbol-{name})",
                marker_end=f"url(#symbol-{name})",
            )
            for name in SERIES
        ),
        *_legend(),
        frame.text("text", "sweep-mark", class_="strong", x=0, y=HEIGHT - 4),
        label(RIGHT, BOTTOM + 34, sweep.axis, "quiet small", anchor="end"),
    )


def _times(speedup: float) -> str:
    return f"{speedup:,g}×"


SYMBOLS: Mapping[RungName, str] = {
    "element": "M5 .8a4.2 4.2 0 1 0 .01 0z",
    "tile": "M2.8 2.8h4.4v4.4h-4.4z",
    "predicted": "M5 1L9 8.5h-8z",
}
"""A ring, a square that fits into it, and a triangle, on a 10 × 10 grid: distinct even where curves coincide."""


def _symbol(name: RungName) -> Markup:
    return element(
        "marker",
        element("path", class_=f"symbol series-{name}", d=SYMBOLS[name]),
        id=f"symbol-{name}",
        viewBox="0 0 10 10",
        refX=5,
        refY=5,
        markerWidth=11,
        markerHeight=11,
        markerUnits="userSpaceOnUse",
    )


def _legend() -> list[Markup]:
    parts = []
    for i, name in enumerate(SERIES):
        x = LEFT + 6 + 130 * i
        parts.append(
            element(
                "path",
                class_=f"series series-{name}",
                d=f"M{x} 14h15h15",
                marker_mid=f"url(#symbol-{name})",
            )
        )
        parts.append(label(x + 37, 18, name, "small"))
    return parts
