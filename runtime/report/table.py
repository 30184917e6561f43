"""The JSON table in the page: the numbers and the frame of every point."""

from __future__ import annotations

from math import isfinite

from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.report.contents import ReportContents
from attnc.runtime.report.point import ReportPoint, parameters_text
from attnc.runtime.report.roofline import intensity, rate
from attnc.runtime.report.slider_frame import SliderFrame
from attnc.runtime.report.timeline import busiest

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
        **_frame_json(frame),
    }


def _frame_json(frame: SliderFrame) -> dict[str, object]:
    return {"texts": frame.texts, "shapes": frame.shapes, "rows": frame.rows, "tiles": frame.tiles}


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
