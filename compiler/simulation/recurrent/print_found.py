"""A simulation of a recurrence as text: the ladder, every pass with its chunks and kernels, and what it is against."""

from __future__ import annotations

from collections.abc import Sequence

from attnc.compiler.simulation.print_simulation import BAR, count, ms, shape_text, size, times
from attnc.compiler.simulation.recurrent.recurrence_simulation import RecurrenceSimulation, SimulatedPass
from attnc.spec.meaning.parameter_values import shown


def print_found(found: RecurrenceSimulation, *, unicode: bool = True) -> str:
    """Return a recurrence's simulation as text: call, ladder, passes, times, plan and the next best."""
    params = "".join(f", {name}={shown(value)}" for name, value in found.params.items())
    moved = found.traffic
    lines = [
        f"{found.pattern}{params}: {found.stage} on {found.title}",
        f"{shape_text(found.shape)}; against causal dense attention at its ideal, {ms(found.ideal_ms)}"
        + ("" if found.calibrated else "; times not calibrated"),
        "",
        *_bars(found, "█" if unicode else "#"),
    ]
    for one in found.passes:
        lines += ["", *_pass(found, one)]
    lines += [
        "",
        f"time      {ms(found.predicted_ms)}, causal dense {ms(found.dense_ms)}: {times(found.speedup)} as fast as it "
        f"runs",
        *_loop(found),
        f"memory    {size(moved.moved)} moved, {size(moved.least)} at least, {size(moved.held)} of states held; "
        f"{count(found.flop)}FLOP in products",
    ]
    lines += [f"plan      {choice.kernel}: {choice.how}; limited by {choice.limit}" for choice in found.choices]
    lines += [f"else      {other.how}: {ms(other.ms)}" for other in found.others]
    lines += [f"note      {note}" for note in found.notes]
    return "\n".join(lines)


def _bars(found: RecurrenceSimulation, block: str) -> list[str]:
    """A line a rung: its time, how much less that is than dense attention's ideal, and what was lost."""
    most = max(rung.speedup for rung in found.rungs)
    lines = []
    for rung in found.rungs:
        bar = block * max(round(BAR * rung.speedup / most), 1)
        time = ms(found.rung_ms(rung.name))
        lines.append(f"  {rung.name:9} {time:>8} {times(rung.speedup):>9}  {bar:{BAR}}  {rung.lost_to}")
    return lines


def _pass(found: RecurrenceSimulation, one: SimulatedPass) -> list[str]:
    rows = "" if one.micro == 1 else f"; {one.micro} rows a token"
    lines = [f"  {one.state}: {one.words}{rows}"]
    if one.costs:
        head = ["chunk", "forward", "backward", "exps", "states", "time"]
        table = [[_mark(one, c.chunk), *_numbers(c.forward, c.backward, c.exps)] for c in one.costs]
        sizes = [[size(c.state_bytes), "does not fit" if c.ms is None else ms(c.ms)] for c in one.costs]
        lines += _table([head, *(a + b for a, b in zip(table, sizes, strict=True))])
    if one.kind != "cpu" and found.stage != "decode" and one.chunk:
        kernels = [[k.name, f"{k.programs:,}", f"{k.steps:,}", size(k.moved), ms(k.ms), k.limit] for k in one.kernels]
        lines += _table([["kernel", "programs", "steps", "moved", "time", "limited by"], *kernels])
    return lines


def _mark(one: SimulatedPass, chunk: int) -> str:
    return f"{chunk} *" if chunk == one.chunk else f"{chunk}  "


def _numbers(*numbers: float) -> list[str]:
    return [count(number).strip() for number in numbers]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    first = rows[0][0] == "kernel"
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        if first:
            cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
        lines.append(f"    {'  '.join(cells)}".rstrip())
    return lines


def _loop(found: RecurrenceSimulation) -> list[str]:
    if found.stage == "decode":
        return []
    if found.reason:
        return [f"loop      it runs token by token: {found.reason}"]
    return [f"loop      token by token {ms(found.loop_ms)}: {times(found.loop_ms / found.predicted_ms)} as long"]


__all__ = ["print_found"]
