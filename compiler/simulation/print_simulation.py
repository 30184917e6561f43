"""A simulation as text: what it is of, the ladder as bars, the schedule, and what else was looked at."""

from __future__ import annotations

from attnc.compiler.simulation.simulation import Simulation

BAR = 30


def print_simulation(found: Simulation, *, unicode: bool = True) -> str:
    """The ladder, a line a rung."""
    shape = found.shape
    tokens = f"{shape.n_q:,} tokens" if shape.n_q == shape.n_k else f"{shape.n_q:,} queries, {shape.n_k:,} keys"
    heads = f"{shape.heads} heads" if shape.heads == shape.kv_heads else f"{shape.heads}/{shape.kv_heads} heads"
    sides = f"{shape.dk}" if shape.dk == shape.dv else f"{shape.dk} and {shape.dv}"
    params = "".join(f", {name}={_shown(value)}" for name, value in found.params.items())
    rival = "dense" if found.baseline == "full" else "causal dense"
    lines = [
        f"{found.pattern}{params}: {found.stage} on {found.title}",
        f"{tokens}, batch {shape.batch}, {heads} of {sides}, {shape.dtype}; against {rival} attention"
        + ("" if found.calibrated else "; times not calibrated"),
        "",
    ]
    most = max((r.speedup for r in found.rungs if r.speedup < float("inf")), default=1.0)
    for rung in found.rungs:
        width = BAR if rung.speedup == float("inf") else round(BAR * rung.speedup / most)
        bar = ("█" if unicode else "#") * max(width, 1)
        lines.append(f"  {rung.name:9} {times(rung.speedup):>9}  {bar:{BAR}}  {rung.lost_to}")
    moved = found.traffic
    lines += [
        "",
        f"time      {ms(found.predicted_ms)}, {rival} {ms(found.dense_ms)}: {times(found.speedup)} as fast"
        f" ({rival} at its ideal {ms(found.ideal_ms)})",
        f"memory    {size(moved.moved)} moved, {size(moved.least)} at least, {size(moved.held)} held; "
        f"{count(found.flop)}FLOP in products of visible pairs",
    ]
    lines += [f"schedule  {choice}; limited by {choice.limit}" for choice in found.choices]
    lines += [f"next best {other}: {ms(other.ms)}" for other in found.others]
    lines += [f"note      {note}" for note in found.notes]
    return "\n".join(lines)


def _shown(value: object) -> str:
    return (
        f"[{', '.join(map(_shown, value))}]"
        if isinstance(value, tuple)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )


def times(speedup: float) -> str:
    """A speedup: `2.59×`."""
    if speedup == float("inf"):
        return "nothing to do"
    return f"{speedup:,.2f}×" if speedup < 100 else f"{speedup:,.0f}×"


def ms(milliseconds: float) -> str:
    """A time in a unit that fits it."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:,.2f} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{milliseconds * 1000:.3g} µs"


def size(bytes_: float) -> str:
    """Bytes in a unit that fits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if bytes_ < 1024:
            return f"{bytes_:.3g} {unit}"
        bytes_ /= 1024
    return f"{bytes_:.4g} TiB"


def count(number: float) -> str:
    """A large number with its prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.4g} P"
