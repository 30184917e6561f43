"""Lowering: a bound program becomes a pattern of the IR; lets and defs are inlined, rationals scaled to integers.

Each line of a recurrence makes a new version of a state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from attnc.compiler import ir
from attnc.compiler.ir import Index, fold, value_nodes, verify_ir
from attnc.compiler.ir.rewrite import substitute
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.lowering.lower_expressions import Lowering, LoweringScope
from attnc.compiler.lowering.lower_round import lower_round
from attnc.compiler.lowering.lower_selections import SelectingLowering
from attnc.compiler.lowering.lowered_operations import OpenSizeError, as_value, fail, number_of
from attnc.spec import program as checked
from attnc.spec.checks.measure import below
from attnc.spec.errors import SpecError
from attnc.spec.names.builtins import SIZES
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
        fail(item.family.span, "A703", message, help_)
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


@verified
def lower(bound: checked.BoundProgram) -> ir.Pattern:
    """Lower a bound program to a pattern of the IR.

    Raises SpecError (code A7xx) where an exact expression has no integer form.
    """
    pattern = _lower(bound, frozenset())
    return replace(pattern, general=_general(bound, pattern))


def _general(bound: checked.BoundProgram, pattern: ir.Pattern) -> ir.OpenExtents | None:
    """The extents and relations with the sizes of the grid left open; None where that is not possible."""
    program = bound.program
    if len(program.segments) != 1 or program.round is not None:
        return None
    extents = [axis.extent for axis in program.segments[0].axes]
    names_read = {node.name for node in below(extents) if isinstance(node, checked.ParameterRead)}
    dims_taken = {dim for tensor in pattern.tensors for dim in tensor.dims} | SIZES
    sizes = {
        p.name: bound.values[p.name] for p in program.parameters if p.name in names_read - dims_taken and not p.per_head
    }
    if not sizes or not all(type(value) is int for value in sizes.values()):
        return None
    try:
        opened = verify_ir.checked(_lower(bound, frozenset(sizes)))
    except (OpenSizeError, SpecError):
        return None
    general = ir.OpenExtents(cast("dict[str, int]", sizes), tuple(extent for _, extent in opened.segments[0].axes), {})
    pairs = [
        (relation.visible, open_relation.visible)
        for relation, open_relation in zip(pattern.nodes, opened.nodes, strict=True)
    ]
    return replace(
        general,
        known={
            relation: open_relation
            for relation, open_relation in pairs
            if substitute(open_relation, general.numbers) is relation
        },
    )


def _lower(bound: checked.BoundProgram, left_open: frozenset[str]) -> ir.Pattern:
    """Lower a program, without `general`. Raises OpenSizeError, and SpecError as `lower` does."""
    program = bound.program
    lowering = lowering_of(bound, left_open)
    per_head, tensors, segments = lowering.per_head, lowering.tensors, tuple(lowering.segments.values())
    visible = None
    if program.round is not None:
        visible = lower_round(program.round, program, lowering)
    if program.approximate is not None:
        lowering.steps = _number(program.approximate, lowering)
    for branch in program.stateful:
        lowering.stateful[branch.name] = lower_branch(branch, lowering, lambda dim: _dim(dim, lowering))
    nodes = tuple(lowering.attend(attend, visible) for attend in program.attends)
    combine, lse = lowering.combined()
    recur = None
    if program.recurrence is not None:
        recur = lower_recurrence(program.recurrence, lowering, lambda dim: _dim(dim, lowering))
    requirements = tuple(
        (lowering.truth(r.condition, LoweringScope()), r.span) for r in program.requirements if r.stage == "call"
    )
    selections = lowering.selections()
    return ir.Pattern(
        name=program.name,
        parameters=dict(bound.values),
        head_lists=tuple((name, len(cast("tuple[object, ...]", bound.values[name]))) for name in sorted(per_head)),
        tensors=(*tensors.values(), *lowering.made.values()),
        segments=segments,
        align=program.align,
        needs_align=program.needs_align,
        documents=None if program.documents is None else tensors[program.documents],
        requirements=requirements,
        nodes=nodes,
        origins=lowering.origins,
        combine=combine,
        lse=lse,
        recur=recur,
        selections=selections,
        stateful=tuple(recur for family in lowering.stateful.values() for recur in family),
    )


def lowering_of(bound: checked.BoundProgram, left_open: frozenset[str] = frozenset()) -> SelectingLowering:
    """Return a lowering with the parameters, inputs and segments of a program, ready to lower expressions."""
    program = bound.program
    per_head = frozenset(p.name for p in program.parameters if p.per_head)
    lowering = SelectingLowering(bound.values, per_head, left_open, bound.lengths, program=program)
    lowering.tensors.update({item: _tensor(item, lowering) for item in program.inputs})
    _segments(program.segments, lowering)
    return lowering


def _tensor(item: checked.Input, lowering: Lowering) -> ir.Tensor:
    kind = item.type.kind
    dims = tuple(_dim(d, lowering) for d in item.type.dims)
    return ir.intern(ir.Tensor(item.name, kind, dims, item.learned, item.type.refinement))


def _dim(dim: Dim, lowering: Lowering) -> str | int:
    """A dimension's name, or its size where parameters determine it."""
    if isinstance(dim, str):
        return lowering.lengths.get(dim, dim)
    if isinstance(dim, int):
        return dim
    return _number(cast("checked.Expr", dim), lowering)


def _number(expr: checked.Expr, lowering: Lowering) -> int:
    """The value of an integer expression that depends on parameters alone."""
    return number_of(lowering.integer(expr, LoweringScope()))


def _segments(segments: tuple[checked.TokenSegment, ...], lowering: Lowering) -> None:
    """Add the IR's segments to the lowering."""
    offset = fold.const(0)
    for segment in segments:
        axes = tuple((axis.name, lowering.integer(axis.extent, LoweringScope())) for axis in segment.axes)
        length = fold.const(1)
        for _, extent in axes:
            length = fold.mul(length, extent)
        lowering.segments[segment] = ir.Segment(segment.name, axes, offset, length)
        offset = fold.add(offset, length)
