"""The contents of a report page, collected before anything is drawn, and the JSON table that the page holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isfinite

from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.report.ladder import ladder_frame
from attnc.runtime.report.markup import SliderFrame
from attnc.runtime.report.point import ReportPoint, facts_frame, parameters_text
from attnc.runtime.report.roofline import Roofline, intensity, rate, roofline_frame
from attnc.runtime.report.schedule_tables import schedule_frame
from attnc.runtime.report.sweep import SweepCurves, sweep_frame
from attnc.runtime.report.tile_section import tile_frame
from attnc.runtime.report.timeline import busiest, timeline_frame


@dataclass(frozen=True)
class ReportContents:
    """The contents of a report, from the arguments of `report_html`. `start` is one of `points`.

    `roofline`: the chart, or a sentence that says why there is none.
    """

    start: ReportPoint
    points: tuple[ReportPoint, ...]
    parameter: str | None
    sweep: SweepCurves | None
    roofline: Roofline | str
    compared: tuple[Simulation, ...]
    break_even: str | None
    growth: str | None

    def frame(self, point: ReportPoint) -> SliderFrame:
        """Return everything that sliders move, at a point."""
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
        """The stops of the length slider."""
        return sorted({point.place[0] for point in self.points})

    @cached_property
    def values(self) -> list[int]:
        """The stops of the parameter slider."""
        return sorted({point.place[1] for point in self.points})


# --- the JSON table in the page --------------------------------------------------------------------------------------


SCHEMA = 1


def table_json(report: ReportContents) -> dict[str, object]:
    """Return the table; `points` are sorted by length, then value, and `at` holds their stops on the sliders."""
    return {
        "schema": SCHEMA,
        "parameter": report.parameter,
        "lengths": report.lengths,
        "values": report.values,
        "points": [_point_json(report, point) for point in report.points],
    }


def _point_json(report: ReportContents, point: ReportPoint) -> dict[str, object]:
    length, value = point.place
    frame = report.frame(point)
    return {
        "at": [report.lengths.index(length), report.values.index(value)],
        "length": point.length,
        "value": point.value,
        "simulation": simulation_json(point.simulation),
        "texts": frame.texts,
        "shapes": frame.shapes,
        "rows": frame.rows,
        "tiles": frame.tiles,
    }


def simulation_json(simulation: Simulation) -> dict[str, object]:
    """Return the numbers of a simulation; infinite numbers are null."""
    tiles, loads = simulation.tiles, simulation.loads
    return {
        "pattern": simulation.pattern,
        "params": parameters_text(simulation),
        "visible": simulation.visible,
        "density": simulation.density,
        "tiles": {"total": tiles.total, "live": tiles.live, "full": tiles.full, "partial": tiles.partial},
        "rungs": [{"name": r.name, "speedup": _finite(r.speedup), "lost_to": r.lost_to} for r in simulation.rungs],
        "predicted_ms": simulation.predicted_ms,
        "dense_ms": simulation.dense_ms,
        "ideal_ms": simulation.ideal_ms,
        "speedup": _finite(simulation.speedup),
        "schedule": [str(choice) for choice in simulation.choices],
        "slots": len(loads),
        "busiest_ms": list(busiest(loads)),
        "mean_ms": sum(loads) / len(loads) if loads else None,
        "flop": simulation.flop,
        "bytes": simulation.traffic.moved,
        "flop_per_byte": intensity(simulation),
        "flop_per_s": rate(simulation),
    }


def _finite(number: float) -> float | None:
    return number if isfinite(number) else None
