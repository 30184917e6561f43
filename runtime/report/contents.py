"""All that a page shows, put together before any of it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.pictures.drawing import Drawing
from attnc.runtime.report.frame import Frame
from attnc.runtime.report.ladder import ladder_frame
from attnc.runtime.report.point import Point, facts_frame, point_of
from attnc.runtime.report.roofline import Roofline, machine_of, roofline_frame, roofline_of
from attnc.runtime.report.sweep import Sweep, sweep_frame, sweep_of
from attnc.runtime.report.tables import schedule_frame
from attnc.runtime.report.tile_map import tile_frame
from attnc.runtime.report.timeline import timeline_frame


@dataclass(frozen=True)
class Report:
    """What `report_html` was given, with charts that know all of it. `start` is among `points`.

    `roofline`: a sentence where there is none.
    """

    start: Point
    points: tuple[Point, ...]
    parameter: str | None
    sweep: Sweep | None
    roofline: Roofline | str
    compared: tuple[Simulation, ...]
    break_even: str | None
    growth: str | None

    def frame(self, point: Point) -> Frame:
        """All that moves, at a point."""
        simulation = point.simulation
        frame = facts_frame(simulation) | ladder_frame(simulation) | tile_frame(simulation, point.drawing)
        frame |= timeline_frame(simulation) | schedule_frame(simulation)
        if isinstance(self.roofline, Roofline):
            frame |= roofline_frame(self.roofline, simulation)
        if self.sweep is not None:
            frame |= sweep_frame(self.sweep, point)
        return frame

    @cached_property
    def lengths(self) -> list[int]:
        """Places of the slider of lengths."""
        return sorted({point.place[0] for point in self.points})

    @cached_property
    def values(self) -> list[int]:
        """Places of the slider of the parameter."""
        return sorted({point.place[1] for point in self.points})


def report_of(
    simulation: Simulation,
    drawing: Drawing | None,
    sweep: Sequence[Simulation] = (),
    points: Sequence[Point] = (),
    compared: Sequence[Simulation] = (),
    growth_text: str | None = None,
    *,
    break_even_text: str | None = None,
    parameter: str | None = None,
    swept: str | None = None,
    machine: Machine | None = None,
) -> Report:
    """As `report_html`."""
    start = point_of(simulation, drawing, parameter)
    found = {point.place: point for point in points}
    if drawing is None and start.place in found:
        start = Point(start.length, start.value, simulation, found[start.place].drawing)
    found[start.place] = start
    table = tuple(found[place] for place in sorted(found))
    return Report(
        start,
        table,
        parameter,
        sweep_of(table, start, sweep, swept, parameter),
        roofline_of([simulation, *(point.simulation for point in table)], compared, machine or machine_of(simulation)),
        tuple(compared),
        break_even_text,
        growth_text,
    )
