"""The derivation of a recurrence as readable text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attnc.compiler.ir import Value
from attnc.compiler.ir.print_ir import print_value
from attnc.compiler.ir.value_nodes import number
from attnc.compiler.recurrences.derived import Coupled, ElementwiseScan, Micro, Mix, Pass, RunningReduction

if TYPE_CHECKING:
    from attnc.compiler.recurrences.recurrence_form import RecurrenceForm


def print_derived(derived: RecurrenceForm) -> str:
    """Return every stage with its class, its steps and its reads, line by line."""
    lines: list[str] = []
    for stage in derived.stages:
        if isinstance(stage, Coupled):
            lines += _coupled(stage)
            continue
        name = stage.state.name
        if isinstance(stage, RunningReduction):
            what = "maximum" if stage.op == "max" else "log-sum-exp"
            lines.append(f"{name}: running {what} of {_text(stage.added)}")
            continue
        dims = ", ".join(map(str, stage.state.dims))
        if isinstance(stage, ElementwiseScan):
            reason = "complex numbers" if stage.state.is_complex else derived.reason
            lines.append(f"{name}[{dims}]: entry by entry, because of {reason}")
            lines.append(f"    {name} = {_factor(stage.decay)} * {name} + {_text(stage.write)}")
            lines += [f"    {read.removeprefix('#')} = {_text(node)}" for read, node in stage.reads]
            continue
        lines.append(f"{name}[{dims}]: {class_of(stage)}")
        for micro in stage.steps:
            lines += [f"    {line}" for line in _step(name, micro)]
        for read_out in stage.reads:
            when = " before its steps" if read_out.before else ""
            lines.append(f"    {read_out.name.removeprefix('#')} = {_factor(read_out.query)} @ {name}{when}")
        for solved in stage.solves:
            matrix = name if solved.factor is number(1.0) else f"{_factor(solved.factor)} * {name}"
            matrix += "" if solved.rest is None else f" + {_text(solved.rest)}"
            lines.append(f"    {solved.name.removeprefix('#')} = solve({matrix}, {_text(solved.vector)})")
            lines[-1] += f", by {solved.steps} steps of conjugate gradients, each a read"
    return "\n".join([*lines, f"out = {_text(derived.result)}"])


def class_of(stage: Pass) -> str:
    """Return the class of a pass in words: its decay and its correction."""
    sides = {"scalar": "a scalar decay", "rows": "a decay of each row", "columns": "a decay of each column"}
    words = [sides[stage.decay.side] if stage.decay else "no decay"]
    form = stage.form()
    if form.is_corrected:
        words.append("delta rule" if form.is_delta else f"a correction of rank one of the {form.correction} state")
    if any(micro.repeat for micro in stage.steps) or len(stage.steps) > 1:
        words.append("several steps a token")
    return ", ".join(words)


def _step(name: str, micro: Micro) -> Iterator[str]:
    if micro.decay is not None:
        yield f"{name} = exp({_text(micro.decay.log)}) * {name}"
    parts = []
    if micro.correction is not None:
        parts.append(f"outer({_text(micro.correction.left)}, {_factor(micro.correction.read)} @ {name})")
    if micro.write is not None:
        parts.append(f"outer({', '.join(map(_text, micro.write))})")
    if parts:
        yield f"{name} = {name} + {' + '.join(parts)}" + (f" for {micro.repeat[0].name}" if micro.repeat else "")


def class_of_coupled(stage: Coupled) -> str:
    """Return the class of coupled states in words: their corrections."""
    words = "states that read each other" if len(stage.states) > 1 else "a factor that may be any number"
    reads = sum(len(impulse.reads) for impulse in stage.impulses)
    return words + {0: "", 1: ", a correction of rank one"}.get(reads, ", corrections of rank one")


def _coupled(stage: Coupled) -> Iterator[str]:
    """Yield the lines of coupled states: impulses, states after a token, and reads, from the states before it."""
    names = [state.name for state in stage.states]
    numbered = len(stage.impulses) > 1
    errors = [f"e{i + 1}" if numbered else "e" for i in range(len(stage.impulses))]
    dims = ", ".join(map(str, stage.states[0].dims))
    states = "states" if names[1:] else "state"
    yield f"{', '.join(names)}[{dims}]: {class_of_coupled(stage)}; in terms of the {states} before the token"
    lefts = [impulse.left for impulse in stage.impulses]

    def text(mix: Mix) -> str:
        parts = [_times(f, name) for f, name in zip(mix.states, names, strict=True) if f is not None]
        written = zip(mix.impulses, lefts, errors, strict=False)
        parts += [_times(w, f"outer({_text(left)}, {e})") for w, left, e in written if w is not None]
        return " + ".join(parts) or "0"

    for impulse, error in zip(stage.impulses, errors, strict=True):
        parts = [] if impulse.value is None else [_text(impulse.value)]
        parts += [f"{_factor(read)} @ ({text(mix)})" for read, mix in impulse.reads]
        yield f"    {error} = {' + '.join(parts)}"
    for name, mix in zip(names, stage.after, strict=True):
        yield f"    {name} = {text(mix)}"
    for mixed in stage.reads:
        state = names[stage.after.index(mixed.of)] if mixed.of in stage.after else f"({text(mixed.of)})"
        yield f"    {mixed.name.removeprefix('#')} = {_factor(mixed.query)} @ {state}"


def _times(factor: Value, text: str) -> str:
    return text if factor is number(1.0) else f"{_factor(factor)} * {text}"


_CURRENT = frozenset({"batch", "head", "kv_head", "q"})
"""The names of indices that stand for the current token and head, and are not printed."""

_SERIAL = re.compile(r"'-?\d+")
_INDICES = re.compile(r"\[([^\[\]]*)\]")


def _text(value: Value) -> str:
    """Return a value as it is written in a recurrence: without the indices of the current token and head."""
    return _INDICES.sub(_without_current, _SERIAL.sub("", print_value(value))).replace("#", "")


def _without_current(match: re.Match[str]) -> str:
    indices = [index for index in match[1].split(", ") if index not in _CURRENT]
    return f"[{', '.join(indices)}]" if indices else ""


def _factor(value: Value) -> str:
    """Return a value as text that can stand in a product, in parentheses unless it is a name."""
    text = _text(value)
    return text if text.isidentifier() else f"({text})"
