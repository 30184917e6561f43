"""The order of stages, so that each runs after the stages whose reads it uses; and removal of unused reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnc.compiler import ir
from attnc.compiler.ir import Value
from attnc.compiler.recurrences.derived import ElementwiseScan, NoFormError, Pass, Stage, values_of


def in_order(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages in an order in which reads are computed before use. Raises NoFormError if there is none."""
    order, waiting = list[Stage](), list(stages)
    while waiting:
        missing = {name for stage in waiting for name in stage.results}
        ready = next((stage for stage in waiting if not _used(stage) & (missing - set(stage.results))), None)
        if ready is None:
            raise NoFormError("states that read each other")
        waiting.remove(ready)
        order.append(ready)
    return tuple(order)


def without_unread(stages: Sequence[Stage], result: Value) -> list[Stage]:
    """Return the stages without reads that neither another stage nor the result uses."""
    used = _used(result).union(*map(_used, stages))
    return [_with_reads(stage, used) for stage in stages]


def _with_reads(stage: Stage, used: set[str]) -> Stage:
    """Return a stage with only the reads named in `used`; running reductions and coupled states keep all reads."""
    if isinstance(stage, ElementwiseScan):
        return replace(stage, reads=tuple(read for read in stage.reads if read[0] in used))
    if isinstance(stage, Pass):
        return replace(stage, reads=tuple(read for read in stage.reads if read.name in used))
    return stage


def _used(part: Stage | Value) -> set[str]:
    """Return the names of the tensors that a stage or a value reads."""
    return {node.tensor.name for value in values_of(part) for node in value.below if isinstance(node, ir.Element)}
