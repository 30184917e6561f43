"""Lowering of recurrences: each line makes a new version of a state, and lets are written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from attnc.compiler import ir
from attnc.compiler.ir import Index, fold, value_nodes
from attnc.compiler.lowering.lower_expressions import Lowering, LoweringScope
from attnc.compiler.lowering.lowered_operations import as_value, number_of
from attnc.spec import program as checked
from attnc.spec.diagnostics import Diagnostic, Label
from attnc.spec.errors import SpecError
from attnc.spec.types import Dim


def lower_branch(
    item: checked.RecurrenceClauses, lowering: Lowering, dim: Callable[[Dim], str | int]
) -> tuple[ir.Recur, ...]:
    """Lower a branch with a state, or all branches of a family.

    Raises SpecError as `lower_recurrence` does, and for an empty family.
    """
    if item.family is None:
        return (lower_recurrence(item, lowering, dim),)
    low, high = (number_of(lowering.integer(end, LoweringScope())) for end in (item.family.low, item.family.high))
    if low >= high:
        message, help_ = f"the range of the family `{item.name}` is empty", "make its end greater than its start"
        raise SpecError((Diagnostic("A703", message, Label(item.family.span), help=help_),))
    branches = []
    for member in range(low, high):
        scope = LoweringScope().bind(item.family.binder, fold.const(member))
        branches.append(replace(lower_recurrence(item, lowering, dim, scope), member=member - low))
    return tuple(branches)


def lower_recurrence(
    item: checked.RecurrenceClauses,
    lowering: Lowering,
    dim: Callable[[Dim], str | int],
    scope: LoweringScope | None = None,
) -> ir.Recur:
    """Lower a recurrence. `dim` returns a dimension's name or size; `scope` holds the names bound around it.

    Raises SpecError where an exact expression has no integer form.
    """
    states = {
        state: ir.State(state.name, tuple(map(dim, state.dims)), state.start, state.is_complex) for state in item.states
    }
    versions = dict.fromkeys(item.states, 0)
    for state, lowered in states.items():
        lowering.states[state] = value_nodes.state_at(lowered.name, 0, lowered.dims)
    outer = scope = scope or LoweringScope()
    steps, read_value = list[ir.Step](), None
    for line in item.lines:
        if isinstance(line, checked.Let):
            scope = scope.bind(line.binder, lowering.lower(line.value, scope))
        elif isinstance(line, checked.ReadClause):
            read_value = lowering.value(line.value, scope)
        else:
            lowered, version = states[line.state], versions[line.state]
            steps.append(_step(line, version, lowering, scope))
            versions[line.state] = version + 1
            lowering.states[line.state] = value_nodes.state_at(lowered.name, version + 1, lowered.dims)
    assert read_value is not None
    order = None if item.scan is None else lowering.integer(item.scan, outer)
    reset = None if item.reset is None else lowering.truth(item.reset, outer)
    return ir.Recur(item.name, tuple(states.values()), tuple(steps), read_value, order, reset)


def _step(line: checked.StepClause, version: int, lowering: Lowering, scope: LoweringScope) -> ir.Step:
    repeat = None
    if line.repeat is not None:
        variable = lowering.variable(line.repeat.binder.name)
        low, high = (lowering.integer(end, scope) for end in (line.repeat.low, line.repeat.high))
        repeat = variable, low, high
        scope = scope.bind(line.repeat.binder, cast("Index", variable))
    return ir.Step(line.state.name, version, as_value(lowering.lower(line.value, scope)), repeat)


__all__ = ["lower_branch", "lower_recurrence"]
