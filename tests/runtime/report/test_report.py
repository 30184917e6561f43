"""Reports: one page that stands alone, says what was simulated, and holds for every place of its sliders."""

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
from attnc.runtime.report.page import report_html, write_report
from attnc.runtime.report.point import ReportPoint
from attnc.runtime.report.table import simulation_json
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
def points_of() -> tuple[ReportPoint, ...]:
    return tuple(ReportPoint(n, w, simulation_of(n, w), drawing_of(n, w)) for n in LENGTHS for w in WINDOWS)


@cache
def page_text() -> str:
    compared = [simulation_of(device="a100"), compile_attention("causal").simulate(256)]
    sweep = [simulation_of(n) for n in (128, 256, 512, 1024)]
    return report_html(
        simulation_of(),
        drawing_of(),
        sweep,
        points_of(),
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


def test_every_section_and_chart_is_there() -> None:
    found = page()
    assert sections(found) == [*SECTIONS[:-1], "compared", "picture"]
    assert charts(found) == CHARTS
    assert [child.tag for child in found.children] == ["html"]
    assert found.children[0].attributes["lang"] == "en"


def test_charts_and_sections_say_what_they_are() -> None:
    found = page()
    ids = [one.attributes["id"] for one in found.walk() if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    for svg in (svg for svg in found.all("svg") if svg.attributes.get("role") == "img"):
        assert svg.children[0].tag == "title" and svg.children[0].text
        assert svg.children[1].tag == "desc" and len(svg.children[1].text) > 10
    for one in found.walk():
        for name in ("aria-labelledby", "for"):
            assert one.attributes.get(name, ids[0]) in ids
    assert all(cell.attributes.get("scope") in ("row", "col") for cell in found.all("th"))


def test_sliders_have_labels_and_words() -> None:
    found = page()
    sliders = [one for one in found.all("input") if one.attributes["type"] == "range"]
    assert [label.text for label in found.all("label")] == ["length", "window"]
    assert [label.attributes["for"] for label in found.all("label")] == [one.attributes["id"] for one in sliders]
    assert [one.attributes["aria-valuetext"] for one in sliders] == ["256", "32"]
    assert [(one.attributes["min"], one.attributes["max"]) for one in sliders] == [("0", "1"), ("0", "1")]


def test_nothing_is_fetched() -> None:
    found = page()
    for one in found.walk():
        assert not {"src", "href", "xlink:href", "action", "srcset", "data"} & one.attributes.keys()
        assert one.tag not in ("link", "img", "iframe", "object", "embed", "base", "a")
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
    assert len(table["points"]) == len(points_of())
    for found, point in zip(table["points"], points_of(), strict=True):
        assert (found["length"], found["value"]) == (point.length, point.value)
        assert found["at"] == [LENGTHS.index(point.length), WINDOWS.index(point.value or 0)]
        assert found["simulation"] == simulation_json(point.simulation)
        assert point.drawing is not None
        assert found["tiles"] == list(tile_rows(point.drawing))


def test_numbers_of_a_point_are_the_simulations() -> None:
    one = simulation_of()
    found: dict[str, Any] = simulation_json(one)
    assert found["predicted_ms"] == one.predicted_ms
    assert found["rungs"] == [{"name": r.name, "speedup": r.speedup, "lost_to": r.lost_to} for r in one.rungs]
    assert found["busiest_ms"][0] == one.loads[0]
    assert len(found["busiest_ms"]) <= 64 < len(one.loads)
    assert found["flop_per_s"] == pytest.approx(one.flop / one.predicted_ms * 1e3)
    assert found["bytes"] == one.traffic.moved


@pytest.mark.parametrize("number", range(len(LENGTHS) * len(WINDOWS)))
def test_a_page_that_starts_at_a_point_shows_its_frame(number: int) -> None:
    """The script puts in place what is drawn there: it needs no geometry of its own."""
    start = points_of()[number]
    found = read(start.simulation, start.drawing, points_of())
    frame = table_of(found)["points"][number]
    for one in found.walk():
        if "data-text" in one.attributes:
            assert one.text == frame["texts"][one.attributes["data-text"]]
    for name, attributes in frame["shapes"].items():
        shape = found.id(name)
        assert {key: shape.attributes[key.lower()] for key in attributes} == attributes
    rows = [[cell.text for cell in row.children] for row in found.id("schedule-rows").children]
    assert rows == frame["rows"]["schedule-rows"]
    assert [[item.text] for item in found.id("notes-rows").children] == frame["rows"]["notes-rows"]


def test_every_name_of_the_script_is_in_the_page() -> None:
    found, script = page(), page().all("script")[-1].text
    ids = {one.attributes.get("id") for one in found.walk()}
    assert set(re.findall(r'byId\("([\w-]+)"\)', script)) <= ids
    assert {f"map-{name}-path" for name in ("full", "partial", "strokes", "mesh")} <= ids


def test_the_simulation_is_added_to_points_that_lack_it() -> None:
    found = read(simulation_of(1024), None, points_of())
    table = table_of(found)
    assert table["lengths"] == [*LENGTHS, 1024]
    assert len(table["points"]) == len(points_of()) + 1
    assert found.id("slide-length").attributes["value"] == "2"


def test_without_points_there_are_no_sliders() -> None:
    found = read(simulation_of(), drawing_of())
    assert found.all("input") == [] and found.all("form") == []
    assert "open" in found.all("details")[0].attributes
    assert len(table_of(found)["points"]) == 1


def test_points_over_lengths_alone_have_one_slider() -> None:
    points = [ReportPoint(n, None, simulation_of(n)) for n in LENGTHS]
    found = read_page(report_html(simulation_of(), None, points=points))
    assert [label.text for label in found.all("label")] == ["length"]
    assert "sweep-chart" in charts(found)


# --- charts ----------------------------------------------------------------------------------------------------------


def test_bars_of_the_ladder_are_in_proportion() -> None:
    found, one = page(), simulation_of()
    widths = [float(found.id(f"ladder-{rung.name}").attributes["width"]) for rung in one.rungs]
    assert widths == pytest.approx([widths[0] * rung.speedup / one.rungs[0].speedup for rung in one.rungs], abs=0.01)
    assert all(rung.lost_to in found.id("ladder-chart").text for rung in one.rungs)


def test_the_roofline_stands_where_the_machine_does() -> None:
    found, machine = page(), find_machine("h100")
    assert f"{machine['hbm_tb_per_s']:.3g} TB/s" in found.id("roofline-chart").text
    assert "989 TFLOP/s bfloat16" in found.id("roofline-chart").text
    assert [one.text for one in found.id("roofline-chart").all("title")][1:] == ["3: causal"]
    gap, point = found.id("roofline-gap").attributes, found.id("roofline-point").attributes
    assert (gap["x1"], gap["y1"]) == (point["cx"], point["cy"])
    assert float(gap["y2"]) <= float(gap["y1"])  # the roof is above


def test_a_curve_has_a_place_for_every_length() -> None:
    found = page()
    for name in ("element", "tile", "predicted"):
        assert found.id(f"sweep-{name}").attributes["d"].count("L") == 3
    assert found.id("sweep-marker").attributes["visibility"] == "visible"
    assert "from 128 tokens on" in found.id("sweep").text and "grows with n" in found.id("sweep").text


def test_a_sweep_over_a_parameter() -> None:
    sweep = [simulation_of(256, window) for window in (16, 32, 64)]
    html = report_html(simulation_of(), None, sweep, points_of(), parameter="window", swept="window")
    found = read_page(html)
    assert found.id("sweep-chart").children[0].text == "Speedup against window"
    assert found.id("sweep-predicted").attributes["d"].count("L") == 2
    html = report_html(
        simulation_of(), None, sweep, [ReportPoint(n, None, simulation_of(n)) for n in LENGTHS], swept="window"
    )
    assert read_page(html).id("sweep-marker").attributes["visibility"] == "hidden"


def test_the_map_is_the_drawings() -> None:
    drawing = drawing_of()
    counts = ["".join(tile_rows(drawing)).count(digit) for digit in "012"]
    assert counts == [drawing.count_tiles(state) for state in (0, 1, 2)]
    assert page().id("map-strokes-path").attributes["d"].count("M") == counts[1]
    tall = replace(drawing, tiles=np.ones((300, 100), dtype=np.int8))
    assert {len(row) for row in tile_rows(tall)} == {13} and len(tile_rows(tall)) == 38


def test_tables_hold_the_schedules_and_what_is_compared() -> None:
    found, one = page(), simulation_of()
    roles = [row.children[0].text for row in found.id("schedule-rows").children]
    assert roles == ["chosen"] * len(one.choices) + ["next best"] * len(one.others)
    rows = [[cell.text for cell in row.children] for row in found.id("compared-rows").children]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[1].partition("(")[0] for row in rows] == ["sliding_window", "sliding_window", "causal"]
    assert "A100" in rows[1][2]


def test_it_says_that_times_are_not_calibrated() -> None:
    assert "times not calibrated" in page().text
    assert "times not calibrated" not in read(replace(simulation_of(), calibrated=True)).text


# --- what may be missing ---------------------------------------------------------------------------------------------


def test_a_report_of_the_cpu_has_no_roofline_and_says_so() -> None:
    found = read(simulation_of(device="cpu"), drawing_of())
    assert charts(found) == [name for name in CHARTS if name not in ("roofline-chart", "sweep-chart")]
    assert "No roofline on the CPU" in found.id("roofline").text
    assert "thread" in found.id("timeline").text


def test_an_unknown_machine_has_no_roofline_unless_it_is_given() -> None:
    other = replace(simulation_of(), device="mine", title="A machine of mine")
    assert "are not available" in read(other).id("roofline").text
    assert "are not available" in read(replace(simulation_of(), title="Another H100")).id("roofline").text
    html = report_html(other, None, machine=find_machine("h100"))
    assert "roofline-chart" in charts(read_page(html))


def test_pairs_that_were_not_counted() -> None:
    one = replace(simulation_of(), visible=None, flop=0)
    found = read(one, None, [ReportPoint(512, 32, replace(simulation_of(512), visible=None, flop=0))])
    assert found.id("roofline-point").attributes["visibility"] == "hidden"
    assert "its visible pairs were not counted" in found.id("roofline").text
    assert "not counted" in found.all("dl")[0].text
    assert table_of(found)["points"][0]["simulation"]["density"] is None


def test_infinite_speedups_are_null_and_bars_are_whole() -> None:
    nothing = tuple(Rung(rung.name, inf, "nothing to do") for rung in simulation_of().rungs)
    one = replace(simulation_of(), rungs=nothing, visible=0, flop=0, predicted_ms=0.0, loads=(0.0, 0.0))
    found = read(one, None, [ReportPoint(n, 32, replace(one, shape=simulation_of(n).shape)) for n in LENGTHS])
    assert [rung["speedup"] for rung in table_of(found)["points"][0]["simulation"]["rungs"]] == [None] * 4
    assert len({found.id(f"ladder-{rung.name}").attributes["width"] for rung in nothing}) == 1
    assert found.id("sweep-element").attributes["d"] == ""
    assert found.id("timeline-bars").attributes["d"] == ""


def test_points_without_a_drawing_hide_the_key_of_the_map() -> None:
    points = [ReportPoint(256, 32, simulation_of(), drawing_of()), ReportPoint(512, 32, simulation_of(512))]
    found = read(simulation_of(512), None, points)
    assert found.id("map-key").attributes["visibility"] == "hidden"
    assert "no picture at this size" in found.id("tiles-chart").text
    assert table_of(found)["points"][0]["shapes"]["map-key"] == {"visibility": "visible"}
    alone = read(simulation_of(512))
    assert "map-key" not in {one.attributes.get("id") for one in alone.walk()}
    assert alone.id("tiles-full").attributes["width"]


def test_a_call_that_decodes_has_no_loads() -> None:
    attend = compile_attention("sliding_window", window=64)
    found = read(attend.simulate(1, 512, stage="decode"))
    assert table_of(found)["points"][0]["length"] == 512
    assert "not simulated" in found.id("timeline").text


def test_values_below_one_stand_on_no_logarithmic_axis() -> None:
    attend = [compile_attention("sliding_window", window=32, sinks=sinks) for sinks in (0, 1, 2)]
    points = [ReportPoint(256, sinks, one.simulate(256)) for sinks, one in enumerate(attend)]
    html = report_html(points[0].simulation, None, points=points, parameter="sinks", swept="sinks")
    found = read_page(html)
    assert table_of(found)["values"] == [0, 1, 2]
    assert found.id("sweep-marker").attributes["visibility"] == "hidden"


# --- what may be hostile ---------------------------------------------------------------------------------------------

HOSTILE = "</script><script>alert(1)</script><!--\"' onload=x & \u2028 \x00 \ud800 ]]>"


def test_nothing_that_is_shown_becomes_markup() -> None:
    one = simulation_of()
    choice = replace(one.choices[0], kernel=HOSTILE, how=HOSTILE, limit=HOSTILE)
    hostile = replace(
        one,
        pattern=HOSTILE,
        params=cast("dict[str, Value]", {HOSTILE: HOSTILE, "window": 32}),
        title=HOSTILE,
        device=HOSTILE,
        notes=(HOSTILE,),
        choices=(choice,),
        others=(choice,),
        workers=HOSTILE,
        rungs=tuple(replace(rung, lost_to=HOSTILE) for rung in one.rungs),
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
    found = read_page(html)
    assert len(found.all("script")) == len(page().all("script"))
    assert not any(name.startswith("on") for one in found.walk() for name in one.attributes)
    assert "<script>alert" not in html and "<!--" not in html
    html.encode("utf-8")
    assert table_of(found)["points"][0]["simulation"]["pattern"] == HOSTILE
    assert "alert(1)" in found.all("h1")[0].text


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, page_text())
    assert path.read_text(encoding="utf-8") == page_text()
    write_report(path, "shorter × \n")
    assert path.read_bytes() == "shorter × \n".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_report_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
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
