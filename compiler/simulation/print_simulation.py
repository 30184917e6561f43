"""Print a simulation: the call, the ladder as bars, the times, the schedule and the next best schedules."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from attnc.spec.meaning.parameter_values import shown

if TYPE_CHECKING:
    from attnc.compiler.simulation.simulation import Shape, Simulation

BAR = 30
"""Characters of the longest bar."""


def print_simulation(simulation: Simulation, *, unicode: bool = True) -> str:
    """Return a simulation as text: the call, a line for each rung, the times, the schedule and the next best ones."""
    rival = "dense" if simulation.baseline == "full" else "causal dense"
    params = "".join(f", {name}={shown(value)}" for name, value in simulation.params.items())
    moved = simulation.traffic
    lines = [
        f"{simulation.pattern}{params}: {simulation.stage} on {simulation.title}",
        f"{shape_text(simulation.shape)}; against {rival} attention at its ideal, {ms(simulation.ideal_ms)}"
        + ("" if simulation.calibrated else "; times not calibrated"),
        "",
        *_bars(simulation, "█" if unicode else "#"),
        "",
        f"time      {ms(simulation.predicted_ms)}, {rival} {ms(simulation.dense_ms)}: "
        f"speedup {times(simulation.speedup)}",
        f"memory    {size(moved.moved)} moved, {size(moved.least)} at least, {size(moved.held)} held; "
        f"{count(simulation.flop)}FLOP in products of visible pairs",
    ]
    lines += [f"schedule  {choice}; limited by {choice.limit}" for choice in simulation.choices]
    lines += [f"next best {other}: {ms(other.ms)}" for other in simulation.others]
    lines += [f"note      {note}" for note in simulation.notes]
    return "\n".join(lines)


def shape_text(shape: Shape) -> str:
    """Return a shape as text: tokens, batch, heads and dtype."""
    tokens = _counted(shape.n_q, "token")
    if shape.n_q != shape.n_k:
        tokens = f"{shape.n_q:,} {'query' if shape.n_q == 1 else 'queries'}, {_counted(shape.n_k, 'key')}"
    heads = _counted(shape.heads, "head") + (
        "" if shape.heads == shape.kv_heads else f" ({_counted(shape.kv_heads, 'kv head')})"
    )
    sides = f"{shape.dk}" if shape.dk == shape.dv else f"{shape.dk} and {shape.dv}"
    return f"{tokens}, batch {shape.batch}, {heads} of {sides}, {shape.dtype}"


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _bars(simulation: Simulation, block: str) -> list[str]:
    """Return a line for each rung: its speedup, a bar, and the reason for its cost."""
    largest = max((r.speedup for r in simulation.rungs if r.speedup < inf), default=1.0)
    lines = []
    for rung in simulation.rungs:
        bar = block * (BAR if rung.speedup == inf else max(round(BAR * rung.speedup / largest), 1))
        lines.append(f"  {rung.name:9} {times(rung.speedup):>9}  {bar:{BAR}}  {rung.lost_to}")
    return lines


def times(speedup: float) -> str:
    """Return a speedup as text, such as `2.59×`."""
    if speedup == inf:
        return "nothing to do"
    return f"{speedup:,.2f}×" if speedup < 100 else f"{speedup:,.0f}×"


def ms(milliseconds: float) -> str:
    """Return a time as text in a fitting unit."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:,.2f} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{milliseconds * 1000:.3g} µs"


def size(bytes_: float) -> str:
    """Return a number of bytes as text in a fitting unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if bytes_ < 1024:
            return f"{bytes_:.3g} {unit}"
        bytes_ /= 1024
    return f"{bytes_:.4g} TiB"


def count(number: float) -> str:
    """Return a number as text with a prefix for its magnitude, such as `1.5 G`."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.4g} P"
