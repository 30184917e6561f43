"""The schedules that were looked at, and what is compared, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler.simulation.print_simulation import ms, size, times
from attnc.compiler.simulation.simulation import RUNGS, SimulatedSchedule, Simulation
from attnc.runtime.report.markup import Markup, element
from attnc.runtime.report.point import density_text, parameters_text, rival, size_text
from attnc.runtime.report.slider_frame import Rows, SliderFrame

SCHEDULE = ("", "kernel", "tiles q×k", "order of tokens", "how", "limited by", "time")
COMPARED = ("", "pattern", "device", "visible", *RUNGS, "time", "dense", "as fast", "moved", "schedule")
NUMBERS = frozenset({"visible", *RUNGS, "time", "dense", "as fast", "moved"})


def schedule_frame(simulation: Simulation) -> SliderFrame:
    """The schedule chosen, the runners-up, and the notes."""
    chosen = [_choice_row("chosen", choice) for choice in simulation.choices]
    others = [_choice_row("next best", choice) for choice in simulation.others]
    return SliderFrame(rows={"schedule-rows": [*chosen, *others], "notes-rows": [[note] for note in simulation.notes]})


def _choice_row(role: str, choice: SimulatedSchedule) -> list[str]:
    tiles = f"{choice.q_tile}×{choice.k_tile}"
    return [role, choice.kernel, tiles, str(choice.order), choice.how, choice.limit, ms(choice.ms)]


def draw_schedule(frame: SliderFrame) -> Markup:
    """The table; its first column heads the rows."""
    return table("Schedules", SCHEDULE, frame.rows["schedule-rows"], "schedule-rows")


def draw_notes(frame: SliderFrame) -> Markup:
    """The notes as a list, which may be empty."""
    return element("ul", *(element("li", *row) for row in frame.rows["notes-rows"]), id="notes-rows")


def draw_compared(simulations: Sequence[Simulation]) -> Markup:
    """A row each; their numbers are those of the roofline."""
    rows = [_compared_row(number, one) for number, one in enumerate(simulations, 1)]
    return table("Side by side", COMPARED, rows, "compared-rows")


def _compared_row(number: int, one: Simulation) -> list[str]:
    params = parameters_text(one)
    choice = one.choices[0]
    return [
        str(number),
        f"{one.pattern}({params})" if params else one.pattern,
        one.title if one.baseline == "full" else f"{one.title}, against {rival(one)}",
        density_text(one),
        *(times(one.rung(name).speedup) for name in RUNGS),
        ms(one.predicted_ms),
        ms(one.dense_ms),
        times(one.speedup),
        size(one.traffic.moved),
        f"{choice.q_tile}×{choice.k_tile}, {choice.order}",
    ]


def draw_devices(simulations: Sequence[Simulation]) -> list[Markup]:
    """Each simulation in full, one after another: what the table has in a row, and what every rung loses to."""
    parts = []
    for number, one in enumerate(simulations, 1):
        params = parameters_text(one)
        name = f"{one.pattern}({params})" if params else one.pattern
        facts = [
            f"{size_text(one)}; {density_text(one)} visible.",
            f"Predicted time {ms(one.predicted_ms)}, {rival(one)} attention {ms(one.dense_ms)}: "
            f"{times(one.speedup)} as fast. Memory moved {size(one.traffic.moved)}.",
            *(f"{rung.name} {times(rung.speedup)}: {rung.lost_to}." for rung in one.rungs),
            *(f"{choice}; limited by {choice.limit}." for choice in one.choices),
            *(f"{note}." for note in one.notes),
        ]
        heading = element("h3", f"{number}: {name} on {one.title}")
        parts += [heading, element("ul", *(element("li", fact) for fact in facts))]
    return parts


def sizes_differ(simulations: Sequence[Simulation]) -> bool:
    """Whether what is compared is not all of one size."""
    return len({size_text(one) for one in simulations}) > 1


def table(caption: str, head: Sequence[str], rows: Rows, name: str) -> Markup:
    """A table whose first column heads the rows."""
    columns = [_style(title) for title in head]
    body = [element("tr", element("th", row[0], scope="row"), *map(_cell, row[1:], columns[1:])) for row in rows]
    titles = [element("th", title, scope="col", class_=style) for title, style in zip(head, columns, strict=True)]
    return element(
        "div",
        element(
            "table",
            element("caption", caption),
            element("thead", element("tr", *titles)),
            element("tbody", *body, id=name),
        ),
        class_="wide",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def _style(title: str) -> str | None:
    return "number" if title in NUMBERS else None


def _cell(text: str, style: str | None) -> Markup:
    return element("td", text, class_=style)
