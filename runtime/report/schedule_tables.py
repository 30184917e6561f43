"""Tables of the considered schedules and of the compared simulations."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler.simulation.print_simulation import ms, size, times
from attnc.compiler.simulation.simulation import RUNGS, SimulatedSchedule, Simulation
from attnc.runtime.report.markup import Markup, Rows, SliderFrame, element
from attnc.runtime.report.point import density_text, parameters_text, rival, size_text

SCHEDULE = ("", "kernel", "tiles q×k", "order of tokens", "how", "limited by", "time")
COMPARED = ("", "pattern", "device", "visible", *RUNGS, "time", "dense", "as fast", "moved", "schedule")
NUMBERS = frozenset({"visible", *RUNGS, "time", "dense", "as fast", "moved"})


def schedule_frame(simulation: Simulation) -> SliderFrame:
    """Return the chosen schedule, the runners-up, and the notes."""
    chosen = [_choice_row("chosen", choice) for choice in simulation.choices]
    others = [_choice_row("next best", choice) for choice in simulation.others]
    return SliderFrame(rows={"schedule-rows": [*chosen, *others], "notes-rows": [[note] for note in simulation.notes]})


def _choice_row(role: str, choice: SimulatedSchedule) -> list[str]:
    tiles = f"{choice.q_tile}×{choice.k_tile}"
    return [role, choice.kernel, tiles, str(choice.order), choice.how, choice.limit, ms(choice.ms)]


def draw_schedule(frame: SliderFrame) -> Markup:
    """Draw the table of schedules; its first column holds the row headings."""
    return table("Schedules", SCHEDULE, frame.rows["schedule-rows"], "schedule-rows")


def draw_notes(frame: SliderFrame) -> Markup:
    """Draw the notes as a list, which may be empty."""
    return element("ul", *(element("li", *row) for row in frame.rows["notes-rows"]), id="notes-rows")


def draw_compared(simulations: Sequence[Simulation]) -> Markup:
    """Draw a row for each simulation; the roofline uses the same numbers."""
    rows = [_compared_row(number, simulation) for number, simulation in enumerate(simulations, 1)]
    return table("Side by side", COMPARED, rows, "compared-rows")


def _compared_row(number: int, simulation: Simulation) -> list[str]:
    params = parameters_text(simulation)
    choice = simulation.choices[0]
    return [
        str(number),
        f"{simulation.pattern}({params})" if params else simulation.pattern,
        simulation.title if simulation.baseline == "full" else f"{simulation.title}, against {rival(simulation)}",
        density_text(simulation),
        *(times(simulation.rung(name).speedup) for name in RUNGS),
        ms(simulation.predicted_ms),
        ms(simulation.dense_ms),
        times(simulation.speedup),
        size(simulation.traffic.moved),
        f"{choice.q_tile}×{choice.k_tile}, {choice.order}",
    ]


def draw_devices(simulations: Sequence[Simulation]) -> list[Markup]:
    """Return each simulation in full: the values of its table row, and the loss at every rung."""
    parts = []
    for number, simulation in enumerate(simulations, 1):
        params = parameters_text(simulation)
        name = f"{simulation.pattern}({params})" if params else simulation.pattern
        facts = [
            f"{size_text(simulation)}; {density_text(simulation)} visible.",
            f"Predicted time {ms(simulation.predicted_ms)}, {rival(simulation)} attention {ms(simulation.dense_ms)}: "
            f"{times(simulation.speedup)} as fast. Memory moved {size(simulation.traffic.moved)}.",
            *(f"{rung.name} {times(rung.speedup)}: {rung.lost_to}." for rung in simulation.rungs),
            *(f"{choice}; limited by {choice.limit}." for choice in simulation.choices),
            *(f"{note}." for note in simulation.notes),
        ]
        heading = element("h3", f"{number}: {name} on {simulation.title}")
        parts += [heading, element("ul", *(element("li", fact) for fact in facts))]
    return parts


def sizes_differ(simulations: Sequence[Simulation]) -> bool:
    """Whether the compared simulations have different sizes."""
    return len({size_text(simulation) for simulation in simulations}) > 1


def table(caption: str, head: Sequence[str], rows: Rows, name: str) -> Markup:
    """Draw a table whose first column holds the row headings."""
    columns = ["number" if title in NUMBERS else None for title in head]
    cells = [[element("td", text, class_=style) for text, style in zip(row, columns, strict=True)] for row in rows]
    body = [element("tr", element("th", row[0], scope="row"), *cell[1:]) for row, cell in zip(rows, cells, strict=True)]
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
