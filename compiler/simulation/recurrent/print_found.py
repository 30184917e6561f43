"""Print the simulation of a recurrence: its ladder, its passes with chunks and kernels, and its times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnc.compiler.simulation.print_simulation import BAR, count, ms, shape_text, size, times
from attnc.spec.meaning.parameter_values import shown

if TYPE_CHECKING:
    from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation, SimulatedPass


def print_found(simulation: RecurrenceSimulation, *, unicode: bool = True) -> str:
    """Return the simulation of a recurrence as text: call, ladder, passes, times, plan and the next best plans."""
    params = "".join(f", {name}={shown(value)}" for name, value in simulation.params.items())
    moved = simulation.traffic
    lines = [
        f"{simulation.pattern}{params}: {simulation.stage} on {simulation.title}",
        f"{shape_text(simulation.shape)}; against causal dense attention at its ideal, {ms(simulation.ideal_ms)}"
        + ("" if simulation.calibrated else "; times not calibrated"),
        "",
        *_bars(simulation, "█" if unicode else "#"),
    ]
    for simulated in simulation.passes:
        lines += ["", *_pass(simulation, simulated)]
    lines += [
        "",
        f"time      {ms(simulation.predicted_ms)}, causal dense {ms(simulation.dense_ms)}: "
        f"speedup {times(simulation.speedup)}",
        *_loop(simulation),
        f"memory    {size(moved.moved)} moved, {size(moved.least)} at least, {size(moved.held)} of states held; "
        f"{count(simulation.flop)}FLOP in products",
    ]
    lines += [f"plan      {choice.kernel}: {choice.how}; limited by {choice.limit}" for choice in simulation.choices]
    lines += [f"else      {other.how}: {ms(other.ms)}" for other in simulation.others]
    lines += [f"note      {note}" for note in simulation.notes]
    return "\n".join(lines)


def _bars(simulation: RecurrenceSimulation, block: str) -> list[str]:
    """Return a line for each rung: its time, its speedup over ideal dense attention, and the reason for its cost."""
    largest = max(rung.speedup for rung in simulation.rungs)
    lines = []
    for rung in simulation.rungs:
        bar = block * max(round(BAR * rung.speedup / largest), 1)
        time = ms(simulation.rung_ms(rung.name))
        lines.append(f"  {rung.name:9} {time:>8} {times(rung.speedup):>9}  {bar:{BAR}}  {rung.lost_to}")
    return lines


def _pass(simulation: RecurrenceSimulation, simulated: SimulatedPass) -> list[str]:
    """Return the lines of a pass: its class, a table of chunks, and a table of kernels."""
    rows_text = "" if simulated.micro == 1 else f"; {simulated.micro} rows a token"
    lines = [f"  {simulated.state}: {simulated.words}{rows_text}"]
    if simulated.costs:
        header = ["chunk", "forward", "backward", "exps", "states", "time"]
        table = [[_mark(simulated, c.chunk), *_numbers(c.forward, c.backward, c.exps)] for c in simulated.costs]
        sizes = [[size(c.state_bytes), "does not fit" if c.ms is None else ms(c.ms)] for c in simulated.costs]
        lines += _table([header, *(a + b for a, b in zip(table, sizes, strict=True))])
    if simulated.kind != "cpu" and simulation.stage != "decode" and simulated.chunk:
        kernels = [
            [k.name, f"{k.programs:,}", f"{k.steps:,}", size(k.moved), ms(k.ms), k.limit] for k in simulated.kernels
        ]
        lines += _table([["kernel", "programs", "steps", "moved", "time", "limited by"], *kernels])
    return lines


def _mark(simulated: SimulatedPass, chunk: int) -> str:
    """Return the length of a chunk, with a star if it is the chosen one."""
    return f"{chunk} *" if chunk == simulated.chunk else f"{chunk}  "


def _numbers(*numbers: float) -> list[str]:
    return [count(number).strip() for number in numbers]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, right-aligned; a table of kernels has its first column left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    is_kernel_table = rows[0][0] == "kernel"
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        if is_kernel_table:
            cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
        lines.append(f"    {'  '.join(cells)}".rstrip())
    return lines


def _loop(simulation: RecurrenceSimulation) -> list[str]:
    """Return the line that compares the plan with running token by token."""
    if simulation.stage == "decode":
        return []
    if simulation.reason:
        return [f"loop      it runs token by token: {simulation.reason}"]
    return [
        f"loop      token by token {ms(simulation.loop_ms)}: "
        f"{times(simulation.loop_ms / simulation.predicted_ms)} as long"
    ]
