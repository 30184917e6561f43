"""Reports: a single self-contained page that shows the simulation, and correct numbers at every slider position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import inf
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from attnc import compile_attention
from attnc.compiler.simulation.machine import find_machine
from attnc.compiler.simulation.simulation import Rung, Simulation
from attnc.runtime.pictures.draw import make_drawing
from attnc.runtime.pictures.drawing import Drawing
from attnc.runtime.report.contents import simulation_json
from attnc.runtime.report.page import report_html, write_report
from attnc.runtime.report.point import ReportPoint
from attnc.runtime.report.tile_section import tile_rows
from attnc.spec.program import Value
from pages import Element, read_page, table_of

LENGTHS, WINDOWS = (256, 512), (32, 64)
SECTIONS = ["ladder", "pattern", "timeline", "roofline", "sweep", "schedule", "picture"]
CHARTS = ["ladder-chart", "tiles-chart", "timeline-chart", "roofline-chart", "sweep-chart"]


@cache
def simulation_of(n: int = 256, window: int = 32, device: str = "h100") -> Simulation:
    return compile_attention("sliding_window", window=window).simulate(n, device=device)


@cache
def drawing_of(n: int = 256, window: int = 32) -> Drawing:
    return make_drawing(compile_attention("sliding_window", window=window), n, n)


@cache
def report_points() -> tuple[ReportPoint, ...]:
    return tuple(ReportPoint(n, w, simulation_of(n, w), drawing_of(n, w)) for n in LENGTHS for w in WINDOWS)


@cache
def page_text() -> str:
    compared = [simulation_of(device="a100"), compile_attention("causal").simulate(256)]
    sweep = [simulation_of(n) for n in (128, 256, 512, 1024)]
    return report_html(
        simulation_of(),
        drawing_of(),
        sweep,
        report_points(),
        compared,
        "grows with n",
        break_even_text="from 128 tokens on",
        parameter="window",
    )


def page() -> Element:
    return read_page(page_text())


def read(simulation: Simulation, drawing: Drawing | None = None, points: Sequence[ReportPoint] = ()) -> Element:
    return read_page(report_html(simulation, drawing, points=points, parameter="window"))


def sections(page: Element) -> list[str]:
    return [section.attributes["id"] for section in page.all("section")]


def charts(page: Element) -> list[str]:
    return [svg.attributes["id"] for svg in page.all("svg") if svg.attributes.get("class") == "chart"]


# --- structure -------------------------------------------------------------------------------------------------------


def test_the_page_has_every_section_and_chart() -> None:
    document = page()
    assert sections(document) == [*SECTIONS[:-1], "compared", "picture"]
    assert charts(document) == CHARTS
    assert [child.tag for child in document.children] == ["html"]
    assert document.children[0].attributes["lang"] == "en"


def test_charts_and_sections_have_titles() -> None:
    document = page()
    ids = [element.attributes["id"] for element in document.walk() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for svg in (svg for svg in document.all("svg") if svg.attributes.get("role") == "img"):
        assert svg.children[0].tag == "title" and svg.children[0].text
        assert svg.children[1].tag == "desc" and len(svg.children[1].text) > 10
    for element in document.walk():
        for name in ("aria-labelledby", "for"):
            assert element.attributes.get(name, ids[0]) in ids
    assert all(cell.attributes.get("scope") in ("row", "col") for cell in document.all("th"))


def test_sliders_have_labels_and_value_texts() -> None:
    document = page()
    sliders = [element for element in document.all("input") if element.attributes["type"] == "range"]
    assert [label.text for label in document.all("label")] == ["length", "window"]
    assert [label.attributes["for"] for label in document.all("label")] == [
        element.attributes["id"] for element in sliders
    ]
    assert [element.attributes["aria-valuetext"] for element in sliders] == ["256", "32"]
    assert [(element.attributes["min"], element.attributes["max"]) for element in sliders] == [("0", "1"), ("0", "1")]


def test_the_page_fetches_nothing() -> None:
    document = page()
    for element in document.walk():
        assert not {"src", "href", "xlink:href", "action", "srcset", "data"} & element.attributes.keys()
        assert element.tag not in ("link", "img", "iframe", "object", "embed", "base", "a")
    assert not re.search(r"@import|url\((?!['\"]?#)", page_text())
    assert set(re.findall(r"https?://[^\"\s]*", page_text())) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page_text()


def test_a_report_is_deterministic() -> None:
    page_text.cache_clear()
    before = page_text()
    page_text.cache_clear()
    assert page_text() == before


# --- the table of points ---------------------------------------------------------------------------------------------


def test_the_table_holds_the_points() -> None:
    table = table_of(page())
    assert (table["parameter"], table["lengths"], table["values"]) == ("window", list(LENGTHS), list(WINDOWS))
    assert len(table["points"]) == len(report_points())
    for row, point in zip(table["points"], report_points(), strict=True):
        assert (row["length"], row["value"]) == (point.length, point.value)
        assert row["at"] == [LENGTHS.index(point.length), WINDOWS.index(point.value or 0)]
        assert row["simulation"] == simulation_json(point.simulation)
        assert point.drawing is not None
        assert row["tiles"] == list(tile_rows(point.drawing))


def test_numbers_of_a_point_are_the_simulations() -> None:
    simulation = simulation_of()
    values: dict[str, Any] = simulation_json(simulation)
    assert values["predicted_ms"] == simulation.predicted_ms
    assert values["rungs"] == [{"name": r.name, "speedup": r.speedup, "lost_to": r.lost_to} for r in simulation.rungs]
    assert values["busiest_ms"][0] == simulation.loads[0]
    assert len(values["busiest_ms"]) <= 64 < len(simulation.loads)
    assert values["flop_per_s"] == pytest.approx(simulation.flop / simulation.predicted_ms * 1e3)
    assert values["bytes"] == simulation.traffic.moved


@pytest.mark.parametrize("number", range(len(LENGTHS) * len(WINDOWS)))
def test_a_page_starts_at_the_frame_of_its_point(number: int) -> None:
    """The script inserts frames that are already drawn, so it computes no geometry."""
    start = report_points()[number]
    document = read(start.simulation, start.drawing, report_points())
    frame = table_of(document)["points"][number]
    for element in document.walk():
        if "data-text" in element.attributes:
            assert element.text == frame["texts"][element.attributes["data-text"]]
    for name, attributes in frame["shapes"].items():
        shape = document.id(name)
        assert {key: shape.attributes[key.lower()] for key in attributes} == attributes
    rows = [[cell.text for cell in row.children] for row in document.id("schedule-rows").children]
    assert rows == frame["rows"]["schedule-rows"]
    assert [[item.text] for item in document.id("notes-rows").children] == frame["rows"]["notes-rows"]


def test_every_name_in_the_script_exists_in_the_page() -> None:
    document, script = page(), page().all("script")[-1].text
    ids = {element.attributes.get("id") for element in document.walk()}
    assert set(re.findall(r'byId\("([\w-]+)"\)', script)) <= ids
    assert {f"map-{name}-path" for name in ("full", "partial", "strokes", "mesh")} <= ids


def test_the_simulation_is_added_to_points_without_it() -> None:
    document = read(simulation_of(1024), None, report_points())
    table = table_of(document)
    assert table["lengths"] == [*LENGTHS, 1024]
    assert len(table["points"]) == len(report_points()) + 1
    assert document.id("slide-length").attributes["value"] == "2"


def test_without_points_there_are_no_sliders() -> None:
    document = read(simulation_of(), drawing_of())
    assert document.all("input") == [] and document.all("form") == []
    assert "open" in document.all("details")[0].attributes
    assert len(table_of(document)["points"]) == 1


def test_points_over_lengths_alone_have_one_slider() -> None:
    points = [ReportPoint(n, None, simulation_of(n)) for n in LENGTHS]
    document = read_page(report_html(simulation_of(), None, points=points))
    assert [label.text for label in document.all("label")] == ["length"]
    assert "sweep-chart" in charts(document)


# --- charts ----------------------------------------------------------------------------------------------------------


def test_bars_of_the_ladder_are_in_proportion() -> None:
    document, simulation = page(), simulation_of()
    widths = [float(document.id(f"ladder-{rung.name}").attributes["width"]) for rung in simulation.rungs]
    assert widths == pytest.approx(
        [widths[0] * rung.speedup / simulation.rungs[0].speedup for rung in simulation.rungs], abs=0.01
    )
    assert all(rung.lost_to in document.id("ladder-chart").text for rung in simulation.rungs)


def test_the_roofline_uses_the_machines_rates() -> None:
    document, machine = page(), find_machine("h100")
    assert f"{machine['hbm_tb_per_s']:.3g} TB/s" in document.id("roofline-chart").text
    assert "989 TFLOP/s bfloat16" in document.id("roofline-chart").text
    assert [element.text for element in document.id("roofline-chart").all("title")][1:] == ["3: causal"]
    gap, point = document.id("roofline-gap").attributes, document.id("roofline-point").attributes
    assert (gap["x1"], gap["y1"]) == (point["cx"], point["cy"])
    assert float(gap["y2"]) <= float(gap["y1"])  # the roof lies above


def test_a_curve_has_a_point_for_every_length() -> None:
    document = page()
    for name in ("element", "tile", "predicted"):
        assert document.id(f"sweep-{name}").attributes["d"].count("L") == 3
    assert document.id("sweep-marker").attributes["visibility"] == "visible"
    assert "from 128 tokens on" in document.id("sweep").text and "grows with n" in document.id("sweep").text


def test_a_sweep_over_a_parameter() -> None:
    sweep = [simulation_of(256, window) for window in (16, 32, 64)]
    html = report_html(simulation_of(), None, sweep, report_points(), parameter="window", swept="window")
    document = read_page(html)
    assert document.id("sweep-chart").children[0].text == "Speedup against window"
    assert document.id("sweep-predicted").attributes["d"].count("L") == 2
    html = report_html(
        simulation_of(), None, sweep, [ReportPoint(n, None, simulation_of(n)) for n in LENGTHS], swept="window"
    )
    assert read_page(html).id("sweep-marker").attributes["visibility"] == "hidden"


def test_the_map_is_that_of_the_drawing() -> None:
    drawing = drawing_of()
    counts = ["".join(tile_rows(drawing)).count(digit) for digit in "012"]
    assert counts == [drawing.count_tiles(state) for state in (0, 1, 2)]
    assert page().id("map-strokes-path").attributes["d"].count("M") == counts[1]
    tall = replace(drawing, tiles=np.ones((300, 100), dtype=np.int8))
    assert {len(row) for row in tile_rows(tall)} == {13} and len(tile_rows(tall)) == 38


def test_tables_list_schedules_and_compared_devices() -> None:
    document, simulation = page(), simulation_of()
    roles = [row.children[0].text for row in document.id("schedule-rows").children]
    assert roles == ["chosen"] * len(simulation.choices) + ["next best"] * len(simulation.others)
    rows = [[cell.text for cell in row.children] for row in document.id("compared-rows").children]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[1].partition("(")[0] for row in rows] == ["sliding_window", "sliding_window", "causal"]
    assert "A100" in rows[1][2]


def test_the_page_says_that_times_are_not_calibrated() -> None:
    assert "times not calibrated" in page().text
    assert "times not calibrated" not in read(replace(simulation_of(), calibrated=True)).text


# --- missing data ----------------------------------------------------------------------------------------------------


def test_a_report_of_the_cpu_has_no_roofline_and_says_so() -> None:
    document = read(simulation_of(device="cpu"), drawing_of())
    assert charts(document) == [name for name in CHARTS if name not in ("roofline-chart", "sweep-chart")]
    assert "No roofline on the CPU" in document.id("roofline").text
    assert "thread" in document.id("timeline").text


def test_an_unknown_machine_has_no_roofline_unless_it_is_given() -> None:
    other = replace(simulation_of(), device="mine", title="A machine of mine")
    assert "are not available" in read(other).id("roofline").text
    assert "are not available" in read(replace(simulation_of(), title="Another H100")).id("roofline").text
    html = report_html(other, None, machine=find_machine("h100"))
    assert "roofline-chart" in charts(read_page(html))


def test_uncounted_pairs() -> None:
    simulation = replace(simulation_of(), visible=None, flop=0)
    document = read(simulation, None, [ReportPoint(512, 32, replace(simulation_of(512), visible=None, flop=0))])
    assert document.id("roofline-point").attributes["visibility"] == "hidden"
    assert "its visible pairs were not counted" in document.id("roofline").text
    assert "not counted" in document.all("dl")[0].text
    assert table_of(document)["points"][0]["simulation"]["density"] is None


def test_infinite_speedups_are_null_with_full_bars() -> None:
    nothing = tuple(Rung(rung.name, inf, "nothing to do") for rung in simulation_of().rungs)
    simulation = replace(simulation_of(), rungs=nothing, visible=0, flop=0, predicted_ms=0.0, loads=(0.0, 0.0))
    document = read(
        simulation, None, [ReportPoint(n, 32, replace(simulation, shape=simulation_of(n).shape)) for n in LENGTHS]
    )
    assert [rung["speedup"] for rung in table_of(document)["points"][0]["simulation"]["rungs"]] == [None] * 4
    assert len({document.id(f"ladder-{rung.name}").attributes["width"] for rung in nothing}) == 1
    assert document.id("sweep-element").attributes["d"] == ""
    assert document.id("timeline-bars").attributes["d"] == ""


def test_points_without_a_drawing_hide_the_maps_legend() -> None:
    points = [ReportPoint(256, 32, simulation_of(), drawing_of()), ReportPoint(512, 32, simulation_of(512))]
    document = read(simulation_of(512), None, points)
    assert document.id("map-key").attributes["visibility"] == "hidden"
    assert "no picture at this size" in document.id("tiles-chart").text
    assert table_of(document)["points"][0]["shapes"]["map-key"] == {"visibility": "visible"}
    alone = read(simulation_of(512))
    assert "map-key" not in {element.attributes.get("id") for element in alone.walk()}
    assert alone.id("tiles-full").attributes["width"]


def test_decode_has_no_loads() -> None:
    attend = compile_attention("sliding_window", window=64)
    document = read(attend.simulate(1, 512, stage="decode"))
    assert table_of(document)["points"][0]["length"] == 512
    assert "not simulated" in document.id("timeline").text


def test_values_below_one_use_a_linear_axis() -> None:
    attend = [compile_attention("sliding_window", window=32, sinks=sinks) for sinks in (0, 1, 2)]
    points = [ReportPoint(256, sinks, element.simulate(256)) for sinks, element in enumerate(attend)]
    html = report_html(points[0].simulation, None, points=points, parameter="sinks", swept="sinks")
    document = read_page(html)
    assert table_of(document)["values"] == [0, 1, 2]
    assert document.id("sweep-marker").attributes["visibility"] == "hidden"


# --- escaping --------------------------------------------------------------------------------------------------------

HOSTILE = "</script><script>alert(1)</script><!--\"' onload=x & \u2028 \x00 \ud800 ]]>"


def test_shown_texts_are_escaped() -> None:
    element = simulation_of()
    choice = replace(element.choices[0], kernel=HOSTILE, how=HOSTILE, limit=HOSTILE)
    hostile = replace(
        element,
        pattern=HOSTILE,
        params=cast("dict[str, Value]", {HOSTILE: HOSTILE, "window": 32}),
        title=HOSTILE,
        device=HOSTILE,
        notes=(HOSTILE,),
        choices=(choice,),
        others=(choice,),
        workers=HOSTILE,
        rungs=tuple(replace(rung, lost_to=HOSTILE) for rung in element.rungs),
    )
    drawing = replace(drawing_of(), title=HOSTILE, subtitle=HOSTILE, relation=HOSTILE, notes=(HOSTILE,))
    html = report_html(
        hostile,
        drawing,
        [hostile, replace(hostile, shape=simulation_of(512).shape)],
        [ReportPoint(256, 64, hostile, drawing)],
        [hostile],
        HOSTILE,
        break_even_text=HOSTILE,
        parameter=HOSTILE,
        machine=find_machine("h100"),
    )
    document = read_page(html)
    assert len(document.all("script")) == len(page().all("script"))
    assert not any(name.startswith("on") for element in document.walk() for name in element.attributes)
    assert "<script>alert" not in html and "<!--" not in html
    html.encode("utf-8")
    assert table_of(document)["points"][0]["simulation"]["pattern"] == HOSTILE
    assert "alert(1)" in document.all("h1")[0].text


# --- writing ---------------------------------------------------------------------------------------------------------


def test_reports_are_written_completely(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, page_text())
    assert path.read_text(encoding="utf-8") == page_text()
    write_report(path, "shorter × \n")
    assert path.read_bytes() == "shorter × \n".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_failed_write_keeps_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_report(path, "new \ud800")
    assert path.read_text() == "old"
    with pytest.raises(OSError):
        write_report(tmp_path / "no" / "report.html", "new")
    with pytest.raises(OSError):
        write_report(tmp_path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.html", tmp_path / "link.html"
    target.write_text("old")
    link.symlink_to(target)
    write_report(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
