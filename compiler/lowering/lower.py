"""Lowering: a bound program becomes a pattern of the IR; lets and defs are inlined, rationals scaled to integers."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from attnc.compiler import fold, ir, verify_ir
from attnc.compiler.lowering.lower_expressions import Lowering, LoweringScope
from attnc.compiler.lowering.lower_recurrence import lower_branch, lower_recurrence
from attnc.compiler.lowering.lower_round import lower_round
from attnc.compiler.lowering.lower_selections import SelectingLowering
from attnc.compiler.lowering.lowered_operations import OpenSizeError, number_of
from attnc.compiler.rewrite import substitute
from attnc.compiler.verify_ir import verified
from attnc.spec import program as checked
from attnc.spec.checks.measure import below
from attnc.spec.errors import SpecError
from attnc.spec.names.builtins import SIZES
from attnc.spec.types import Dim


@verified
def lower(bound: checked.BoundProgram) -> ir.Pattern:
    """The pattern of a bound program.

    Raises SpecError (code A7xx) where an exact expression has no integer form.
    """
    pattern = _lower(bound, frozenset())
    return replace(pattern, general=_general(bound, pattern))


def _general(bound: checked.BoundProgram, pattern: ir.Pattern) -> ir.OpenExtents | None:
    """The pattern with the extents of its grid left open, as far as it can be."""
    program = bound.program
    if len(program.segments) != 1 or program.round is not None:
        return None
    extents = [axis.extent for axis in program.segments[0].axes]
    read = {node.name for node in below(extents) if isinstance(node, checked.ParameterRead)}
    taken = {dim for tensor in pattern.tensors for dim in tensor.dims} | SIZES
    sizes = {p.name: bound.values[p.name] for p in program.parameters if p.name in read - taken and not p.per_head}
    if not sizes or not all(type(value) is int for value in sizes.values()):
        return None
    try:
        opened = verify_ir.checked(_lower(bound, frozenset(sizes)))
    except (OpenSizeError, SpecError):
        return None
    general = ir.OpenExtents(cast("dict[str, int]", sizes), tuple(extent for _, extent in opened.segments[0].axes), {})
    pairs = [(own.visible, other.visible) for own, other in zip(pattern.nodes, opened.nodes, strict=True)]
    return replace(general, known={own: other for own, other in pairs if substitute(other, general.numbers) is own})


def _lower(bound: checked.BoundProgram, left_open: frozenset[str]) -> ir.Pattern:
    """The pattern, without its general form. Raises OpenSizeError and as `lower`."""
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
    """Return a lowering that knows the parameters, inputs and segments of a program, so that it lowers expressions."""
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
    """A dimension's name, or its number."""
    if isinstance(dim, str):
        return lowering.lengths.get(dim, dim)
    if isinstance(dim, int):
        return dim
    return _number(cast("checked.Expr", dim), lowering)


def _number(expr: checked.Expr, lowering: Lowering) -> int:
    """An integer that the parameters alone make."""
    return number_of(lowering.integer(expr, LoweringScope()))


def _segments(segments: tuple[checked.TokenSegment, ...], lowering: Lowering) -> None:
    """Put the segments of the IR into the lowering."""
    offset = fold.const(0)
    for segment in segments:
        axes = tuple((axis.name, lowering.integer(axis.extent, LoweringScope())) for axis in segment.axes)
        length = fold.const(1)
        for _, extent in axes:
            length = fold.mul(length, extent)
        lowering.segments[segment] = ir.Segment(segment.name, axes, offset, length)
        offset = fold.add(offset, length)
