"""Families of branches and selections, and names that run over ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnc.spec import program, syntax
from attnc.spec.report import DiagnosticList
from attnc.spec.source import Span


def family_of(block: syntax.BlockStatement, report: DiagnosticList) -> syntax.LoopVariable | None:
    """The name and the range of a family of branches; None where there is one branch, or after a complaint."""
    loop_variables = family_names(block, report)
    if len(loop_variables) > 1:
        _refuse(block, loop_variables[0], report)
    return loop_variables[0] if len(loop_variables) == 1 else None


def family_names(block: syntax.BlockStatement, report: DiagnosticList) -> tuple[syntax.LoopVariable, ...]:
    """The names of a family with their ranges; none where there is no family, or after a complaint."""
    found = []
    for binder in block.binders:
        if not isinstance(binder, syntax.LoopVariable) or binder.domain is None:
            _refuse(block, binder, report)
            return ()
        found.append(binder)
    return tuple(found)


def _refuse(block: syntax.BlockStatement, binder: syntax.Binder, report: DiagnosticList) -> None:
    name, word = block.name.id if block.name else "near", block.word.id
    several = ", or several" if word == "select" else ""
    help_ = f"one range{several}: `{word} {name}[c in 0 .. n]`"
    report.error("A210", "a family runs over a range", binder.span, "over what?", help=help_)


def range_of(item: syntax.LoopVariable, exact: Callable[[syntax.Expr], program.Expr]) -> program.KeyRange:
    """A name with its range; `exact` resolves its ends."""
    zero = program.Literal(item.span, 0)
    match item.domain:
        case syntax.RangeExpr(low=low, high=high):
            ends = exact(low), exact(high)
        case None:
            ends = zero, zero
        case count:
            ends = zero, exact(count)
    return program.KeyRange(item.span, program.Binder(item.name.span, item.name.id), *ends)


def joined(span: Span, parts: Sequence[program.KeyRange]) -> tuple[program.KeyRange, tuple[program.Definition, ...]]:
    """Several ranges as one, numbered from 0, the last the fastest, and what each name is of its number."""
    flat = program.Binder(span, ", ".join(part.binder.name for part in parts))
    place: program.Expr = program.Local(span, flat)
    one, zero = (program.Literal(span, n) for n in (1, 0))
    count: program.Expr = one
    names = []
    for part in reversed(parts):
        at = part.span
        size = program.Operation(at, "max", (program.Operation(at, "sub", (part.high, part.low)), zero))
        rest = place if count is one else program.Operation(at, "floordiv", (place, count))
        own = rest if part is parts[0] else program.Operation(at, "mod", (rest, size))
        body = program.Operation(at, "add", (part.low, own))
        names.append(program.Definition(part.binder.span, part.binder.name, (), body))
        count = size if count is one else program.Operation(at, "mul", (size, count))
    return program.KeyRange(span, flat, zero, count, parts=tuple(parts)), tuple(reversed(names))


def number_in(span: Span, parts: Sequence[program.KeyRange], places: Sequence[program.Expr]) -> program.Expr:
    """The number of a place in each of several ranges, as `joined` numbers them; -1 where one is outside of its own."""
    number: program.Expr = program.Literal(span, 0)
    inside: list[program.Expr] = []
    for part, place in zip(parts, places, strict=True):
        size = program.Operation(span, "sub", (part.high, part.low))
        operation = program.Operation(span, "sub", (place, part.low))
        number = program.Operation(span, "add", (program.Operation(span, "mul", (number, size)), operation))
        inside.append(program.Operation(span, "le", (part.low, place)))
        inside.append(program.Operation(span, "lt", (place, part.high)))
    outside = program.Literal(span, -1)
    return program.ConditionalValue(span, program.Operation(span, "and", tuple(inside)), number, outside)


__all__ = ["family_names", "family_of", "joined", "number_in", "range_of"]
