"""The order of stages, so that each runs after the stages whose reads it uses; and removal of unused reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnc.compiler import ir
from attnc.compiler.ir import Value
from attnc.compiler.recurrences.coupled_states import values_of
from attnc.compiler.recurrences.derived import Coupled, ElementwiseScan, NoFormError, Pass, RunningReduction, Stage


def in_order(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages in an order in which reads are computed before use. Raises NoFormError if there is none."""
    all_names = {name for stage in stages for name in _names(stage)}
    order, waiting = list[Stage](), list(stages)
    while waiting:
        missing = all_names - {name for stage in order for name in _names(stage)}
        ready = next((stage for stage in waiting if not _used(stage) & (missing - set(_names(stage)))), None)
        if ready is None:
            raise NoFormError("states that read each other")
        waiting.remove(ready)
        order.append(ready)
    return tuple(order)


def _names(stage: Stage) -> list[str]:
    """Return the names of a stage's reads; none for running reductions, which always run first."""
    if isinstance(stage, RunningReduction):
        return []
    if isinstance(stage, ElementwiseScan):
        return [name for name, _ in stage.reads]
    return [read.name for read in (*stage.reads, *(stage.solves if isinstance(stage, Pass) else ()))]


def without_unread(stages: Sequence[Stage], result: Value) -> list[Stage]:
    """Return the stages without reads that neither another stage nor the result uses."""
    used = _names_in([result]).union(*map(_used, stages))
    return [_with_reads(stage, used) if isinstance(stage, ElementwiseScan | Pass) else stage for stage in stages]


def _with_reads(stage: ElementwiseScan | Pass, used: set[str]) -> ElementwiseScan | Pass:
    """Return a stage with only the reads named in `used`."""
    if isinstance(stage, ElementwiseScan):
        return replace(stage, reads=tuple(read for read in stage.reads if read[0] in used))
    return replace(stage, reads=tuple(read for read in stage.reads if read.name in used))


def _used(stage: Stage) -> set[str]:
    """Return the names of the tensors that a stage reads; running reductions read no computed tensor."""
    return set() if isinstance(stage, RunningReduction) else _names_in(_values(stage))


def _names_in(values: Sequence[Value]) -> set[str]:
    return {node.tensor.name for value in values for node in value.below if isinstance(node, ir.Element)}


def _values(stage: Pass | ElementwiseScan | Coupled) -> list[Value]:
    """Return the values that a stage computes."""
    if isinstance(stage, Coupled):
        return values_of(stage)
    if isinstance(stage, ElementwiseScan):
        return [stage.decay, stage.write, *(node for _, node in stage.reads)]
    values = [read.query for read in stage.reads]
    for solved in stage.solves:
        values += [solved.factor, solved.vector, *([] if solved.rest is None else [solved.rest])]
    for micro in stage.steps:
        values += [micro.decay.log] if micro.decay else []
        values += [micro.correction.left, micro.correction.read] if micro.correction else []
        values += list(micro.write or ())
    return values


__all__ = ["in_order", "without_unread"]
