"""The page of a pattern with states: its branches side by side, its ladder and its schedules, without sliders."""

from __future__ import annotations

from attnc.compiler.simulation.print_simulation import ms, shape_text, size, times
from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.pictures.branch_svg import branches_svg
from attnc.runtime.pictures.branch_views import BranchesDrawing
from attnc.runtime.report.markup import Markup, element, joined
from attnc.runtime.report.page import card, head, header, paragraphs
from attnc.runtime.report.point import parameters_text, rival
from attnc.runtime.report.schedule_tables import table

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
        _header(simulation),
        card("branches", "Branches", Markup(branches_svg(drawing)), scrolls=True),
        card("derivation", "What each branch does", *derivations),
        card("ladder", f"Ladder over ideal {dense} attention", table("Ladder", LADDER, rungs, "rungs")),
        card("schedule", "Schedule", table("Schedules", SCHEDULE, choices, "schedule-rows")),
        card("notes", "Notes", element("ul", *(element("li", note) for note in simulation.notes)), *texts),
    ]
    main = element("body", element("main", joined(body, "\n")))
    return f"<!DOCTYPE html>\n{element('html', head(simulation), main, lang='en')}\n"


def _header(simulation: Simulation) -> Markup:
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
