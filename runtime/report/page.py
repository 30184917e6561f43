"""The layout of the pages: with the data that sliders select from, and of patterns with states, without sliders."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from uuid import uuid4

from attnc.compiler.simulation.machine import Machine
from attnc.compiler.simulation.print_simulation import ms, shape_text, size, times
from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.pictures.branch_svg import branches_svg
from attnc.runtime.pictures.branch_views import BranchesDrawing
from attnc.runtime.pictures.drawing import Drawing
from attnc.runtime.pictures.svg import to_svg
from attnc.runtime.report.contents import ReportContents, table_json
from attnc.runtime.report.ladder import draw_ladder
from attnc.runtime.report.markup import Markup, SliderFrame, element, embedded_json, joined
from attnc.runtime.report.point import ReportPoint, parameters_text, point_of, rival
from attnc.runtime.report.roofline import draw_roofline, machine_of, roofline_of
from attnc.runtime.report.schedule_tables import (
    draw_compared,
    draw_devices,
    draw_notes,
    draw_schedule,
    sizes_differ,
    table,
)
from attnc.runtime.report.sweep import draw_sweep, sweep_of
from attnc.runtime.report.tile_section import draw_tiles
from attnc.runtime.report.timeline import NO_LOADS, draw_timeline


def report_html(
    simulation: Simulation,
    drawing: Drawing | None,
    sweep: Sequence[Simulation] = (),
    points: Sequence[ReportPoint] = (),
    compared: Sequence[Simulation] = (),
    growth_text: str | None = None,
    *,
    break_even_text: str | None = None,
    parameter: str | None = None,
    swept: str | None = None,
    machine: Machine | None = None,
) -> str:
    """Return a self-contained page; equal arguments give equal texts.

    `points`: the stops of the sliders, over lengths and values of `parameter`; `simulation` is added if it is missing.
    `sweep`: simulations over the parameter `swept`, or over lengths if that is None. `compared`: simulations of other
    patterns, baselines or devices. `machine`: the machine of the roofline; by default found by its name. The texts on
    break-even and growth come from the caller.
    """
    start = point_of(simulation, drawing, parameter)
    by_place = {point.place: point for point in points}
    if drawing is None and start.place in by_place:
        start = replace(start, drawing=by_place[start.place].drawing)
    by_place[start.place] = start
    all_points = tuple(by_place[place] for place in sorted(by_place))
    shown = [simulation, *(point.simulation for point in all_points)]
    report = ReportContents(
        start,
        all_points,
        parameter,
        sweep_of(all_points, start, sweep, swept, parameter),
        roofline_of(shown, compared, machine or machine_of(simulation)),
        tuple(compared),
        break_even_text,
        growth_text,
    )
    return f"<!DOCTYPE html>\n{_page(report, drawing)}\n"


def write_report(path: str | Path, html: str) -> None:
    """Write a page atomically: the file at `path` stays until the new page is complete. Raises OSError."""
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_text(html, encoding="utf-8", newline="\n")  # a terminal or a pipe has no content to keep
        return
    path = path.resolve()
    part = path.with_name(f".attnc-{uuid4().hex}.part")
    try:
        with part.open("x", encoding="utf-8", newline="\n") as file:
            file.write(html)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# --- parts -----------------------------------------------------------------------------------------------------------


@cache
def asset(name: str) -> str:
    """Return the text of an asset file of the page."""
    return (files("attnc.runtime") / "report" / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _page(report: ReportContents, drawing: Drawing | None) -> Markup:
    simulation, frame = report.start.simulation, report.frame(report.start)
    script = asset("page.js")
    tiles = draw_tiles(frame, has_map=any(point.drawing is not None for point in report.points))
    body = [
        _header(report, frame),
        _controls(report),
        card("ladder", "Ladder: from the visible pairs to the predicted time", draw_ladder(frame), scrolls=True),
        element("div", card("pattern", "Pattern and tile classes", tiles), _timeline(report, frame), class_="pair"),
        element("div", _roofline(report, frame), _sweep(report, frame), class_="pair"),
        card("schedule", "Schedule", draw_schedule(frame), element("h3", "Notes"), draw_notes(frame)),
        *_compared(report),
        *_whole_picture(report, drawing),
        _footer(simulation),
    ]
    data = element("script", embedded_json(table_json(report)), type="application/json", id="attnc-data")
    return element(
        "html",
        head(simulation, script),
        element("body", element("main", joined(body, "\n")), data, "\n", element("script", Markup(script))),
        lang="en",
    )


def head(simulation: Simulation, script: str | None = None) -> Markup:
    """Return the head of a page, whose policy forbids fetching and allows only the page's own script, by its hash."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script is not None:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{simulation.pattern} on {simulation.title}: attnc simulate"),
        element("style", Markup(asset("page.css"))),
    )


def _header(report: ReportContents, frame: SliderFrame) -> Markup:
    simulation = report.start.simulation
    names = [
        ("time", "predicted time"),
        ("speedup", f"as fast as {rival(simulation)}"),
        ("bound", "element bound"),
        ("density", "visible"),
        ("moved", "memory moved"),
        ("work", "work"),
    ]
    facts = [
        (words, frame.text("dd", name, class_="large"), frame.text("dd", f"{name}-beside", class_="quiet"))
        for name, words in names
    ]
    return header(simulation, frame.text("p", "subject", class_="quiet"), facts)


def header(simulation: Simulation, subject: Markup, facts: Sequence[tuple[str, Markup, Markup]]) -> Markup:
    """Return the header of a page; each fact is its words, its number, and what stands beside the number."""
    badge = [] if simulation.calibrated else [element("span", "times not calibrated", class_="badge")]
    return element(
        "header",
        element("h1", simulation.pattern),
        element("p", f"{simulation.stage} on {simulation.title} ", *badge),
        subject,
        element("dl", *(element("div", element("dt", words), *numbers) for words, *numbers in facts), class_="facts"),
    )


def _controls(report: ReportContents) -> Markup:
    """Return a slider for the length and for the parameter, where more than one stop exists."""
    sliders = []
    if len(report.lengths) > 1:
        stops = [f"{n:,}" for n in report.lengths]
        sliders.append(_slider("length", "length", stops, report.lengths.index(report.start.place[0])))
    if len(report.values) > 1 and report.parameter is not None:
        stops = [f"{n:,}" for n in report.values]
        sliders.append(_slider("value", report.parameter, stops, report.values.index(report.start.place[1])))
    if not sliders:
        return Markup()
    return element(
        "form",
        *sliders,
        element("p", "", id="missing", class_="quiet", role="status"),
        element("noscript", "The sliders need JavaScript; without it the page shows the starting point."),
        class_="controls",
        aria_label="What is shown",
        autocomplete="off",
    )


def _slider(name: str, words: str, stops: Sequence[str], start: int) -> Markup:
    slider = element(
        "input",
        type="range",
        id=f"slide-{name}",
        min="0",
        max=str(len(stops) - 1),
        step="1",
        value=str(start),
        aria_valuetext=stops[start],
        autocomplete="off",
    )
    return element(
        "div",
        element("label", words, for_=f"slide-{name}"),
        slider,
        element("output", stops[start], id=f"slide-{name}-said", for_=f"slide-{name}"),
        class_="slider",
    )


def card(name: str, title: str, *parts: str, scrolls: bool = False) -> Markup:
    """Return a section with its heading; `scrolls`: the content scrolls sideways where it is wider than the page."""
    inside = (element("div", *parts, class_="wide"),) if scrolls else parts
    return element("section", element("h2", title, id=f"{name}-head"), *inside, id=name, aria_labelledby=f"{name}-head")


def _timeline(report: ReportContents, frame: SliderFrame) -> Markup:
    workers = report.start.simulation.workers
    name = "SM slot" if workers == "SMs" else workers.removesuffix("s")
    has_loads = any(point.simulation.loads for point in report.points)
    content = draw_timeline(frame) if has_loads else element("p", NO_LOADS)
    return card("timeline", f"Timeline: work of every {name}", content)


def _roofline(report: ReportContents, frame: SliderFrame) -> Markup:
    roofline = report.roofline
    if isinstance(roofline, str):
        return card("roofline", "Roofline", element("p", roofline))
    words = "The circle is the call; diamonds with numbers are rows of the table side by side, on the same device."
    legend = [element("p", words, class_="quiet")] if roofline.others else []
    return card("roofline", "Roofline", draw_roofline(roofline, frame), *legend)


def _sweep(report: ReportContents, frame: SliderFrame) -> Markup:
    sweep = report.sweep
    title = "Sweep" if sweep is None else f"Sweep: speedup against {sweep.axis}"
    content = element("p", "No sweep: one size was simulated.") if sweep is None else draw_sweep(sweep, frame)
    return card("sweep", title, content, *paragraphs(("Break-even", report.break_even), ("Growth", report.growth)))


def paragraphs(*texts: tuple[str, str | None]) -> list[Markup]:
    """Return a paragraph for each named text that is not empty."""
    return [element("p", element("b", f"{name}: "), words) for name, words in texts if words]


def _compared(report: ReportContents) -> list[Markup]:
    if not report.compared:
        return []
    simulations = [report.start.simulation, *report.compared]
    words = "Simulated at the starting point; the sliders do not change this table."
    if sizes_differ(simulations):
        words += " The sizes differ."
    caption = element("p", words, class_="quiet")
    return [card("compared", "Side by side", draw_compared(simulations), caption, *draw_devices(simulations))]


def _whole_picture(report: ReportContents, drawing: Drawing | None) -> list[Markup]:
    """Return the whole picture, collapsed if sliders move the small one."""
    if drawing is None:
        return []
    caption = f"All pairs as squares, and the keys of each query, at {drawing.size_text} (the sliders do not change it)"
    relation = [element("p", drawing.relation, class_="code")] if drawing.relation else []
    picture = element("div", *relation, element("div", Markup(to_svg(drawing)), class_="wide"))
    opened = {} if len(report.points) > 1 else {"open": ""}
    return [card("picture", "Picture", element("details", element("summary", caption), picture, **opened))]


def _footer(simulation: Simulation) -> Markup:
    dense = rival(simulation)
    figures = "This CPU's rates" if simulation.device == "cpu" else "The machine's figures"
    words = [
        f"Speedups of the ladder are relative to ideal {dense} attention: every unit busy, no tail, no launch. "
        f"All times are predicted, including those of {dense} attention.",
        "" if simulation.calibrated else f" {figures} are published or estimated; none was measured here.",
    ]
    return element("footer", *words)


# --- the page of a pattern with states -------------------------------------------------------------------------------


LADDER = ("", "speedup", "lost to")
SCHEDULE = ("", "runs as", "limited by", "time")


def states_html(simulation: Simulation, drawing: BranchesDrawing, growth_text: str, break_even_text: str) -> str:
    """Return a self-contained page without scripts; equal arguments give equal texts."""
    dense = rival(simulation)
    texts = paragraphs(("Growth", growth_text), ("Break-even", break_even_text))
    derivations = [
        part for view in drawing.views for part in (element("h3", view.name), element("pre", "\n".join(view.words)))
    ]
    rungs = [[rung.name, times(rung.speedup), rung.lost_to] for rung in simulation.rungs]
    choices = [
        [schedule.kernel, schedule.how, schedule.limit, ms(schedule.ms)]
        for schedule in (*simulation.choices, *simulation.others)
    ]
    body = [
        _states_header(simulation),
        card("branches", "Branches", Markup(branches_svg(drawing)), scrolls=True),
        card("derivation", "What each branch does", *derivations),
        card("ladder", f"Ladder over ideal {dense} attention", table("Ladder", LADDER, rungs, "rungs")),
        card("schedule", "Schedule", table("Schedules", SCHEDULE, choices, "schedule-rows")),
        card("notes", "Notes", element("ul", *(element("li", note) for note in simulation.notes)), *texts),
    ]
    main = element("body", element("main", joined(body, "\n")))
    return f"<!DOCTYPE html>\n{element('html', head(simulation), main, lang='en')}\n"


def _states_header(simulation: Simulation) -> Markup:
    params = parameters_text(simulation)
    dense, moved = rival(simulation), simulation.traffic
    facts = [
        ("predicted time", ms(simulation.predicted_ms), f"{dense} attention {ms(simulation.dense_ms)}"),
        (f"as fast as {dense}", times(simulation.speedup), f"{dense} at its ideal {ms(simulation.ideal_ms)}"),
        ("memory moved", size(moved.moved), f"{size(moved.least)} at least, {size(moved.held)} held"),
    ]
    subject = element("p", f"{shape_text(simulation.shape)}{' · ' + params if params else ''}", class_="quiet")
    numbers = [
        (words, element("dd", number, class_="large"), element("dd", beside, class_="quiet"))
        for words, number, beside in facts
    ]
    return header(simulation, subject, numbers)
