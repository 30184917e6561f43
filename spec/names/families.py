"""Resolve families of branches and selections, names with ranges, and names that iterate over a selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnc.spec import program, syntax
from attnc.spec.diagnostics import DiagnosticList
from attnc.spec.source import Span


def family_of(block: syntax.BlockStatement, report: DiagnosticList) -> syntax.LoopVariable | None:
    """Return the index of a family of branches; None for a single branch, or after an error was reported."""
    loop_variables = family_names(block, report)
    if len(loop_variables) > 1:
        _refuse(block, loop_variables[0], report)
    return loop_variables[0] if len(loop_variables) == 1 else None


def family_names(block: syntax.BlockStatement, report: DiagnosticList) -> tuple[syntax.LoopVariable, ...]:
    """Return the indices of a family with their ranges; none without a family, or after an error was reported."""
    variables = []
    for binder in block.binders:
        if not isinstance(binder, syntax.LoopVariable) or binder.domain is None:
            _refuse(block, binder, report)
            return ()
        variables.append(binder)
    return tuple(variables)


def _refuse(block: syntax.BlockStatement, binder: syntax.Binder, report: DiagnosticList) -> None:
    name, word = block.name.id if block.name else "near", block.word.id
    several = ", or several ranges" if word == "select" else ""
    help_ = f"write one range{several}: `{word} {name}[c in 0 .. n]`"
    report.error("A210", "the index of a family needs a range", binder.span, "over which values?", help=help_)


def range_of(item: syntax.LoopVariable, exact: Callable[[syntax.Expr], program.Expr]) -> program.KeyRange:
    """Return a name with its range; `exact` resolves the ends."""
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
    """Return several ranges as one flat range from 0, the last varying fastest, and the definition of each name."""
    flat = program.Binder(span, ", ".join(part.binder.name for part in parts))
    index: program.Expr = program.Local(span, flat)
    one, zero = (program.Literal(span, n) for n in (1, 0))
    count: program.Expr = one
    names = []
    for part in reversed(parts):
        part_span = part.span
        size = program.Operation(part_span, "max", (program.Operation(part_span, "sub", (part.high, part.low)), zero))
        quotient = index if count is one else program.Operation(part_span, "floordiv", (index, count))
        offset = quotient if part is parts[0] else program.Operation(part_span, "mod", (quotient, size))
        body = program.Operation(part_span, "add", (part.low, offset))
        names.append(program.Definition(part.binder.span, part.binder.name, (), body))
        count = size if count is one else program.Operation(part_span, "mul", (size, count))
    return program.KeyRange(span, flat, zero, count, parts=tuple(parts)), tuple(reversed(names))


def number_in(span: Span, parts: Sequence[program.KeyRange], places: Sequence[program.Expr]) -> program.Expr:
    """Return the flat index of `places`, numbered as in `joined`; -1 where a place is outside its range."""
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


@dataclass(frozen=True, slots=True, eq=False)
class SelectedPlace:
    """A name that iterates over a selection from a range; its value is the index of the selected entry.

    `member` is the index of the selection in its family.
    """

    selection: program.SelectionClauses
    over: program.KeyRange
    binder: program.Binder
    member: program.Expr | None
    by_query: bool

    def is_selected(self, span: Span) -> program.Expr:
        """Return the test whether the current row selected the entry."""
        number = program.Local(span, self.binder)
        return program.SelectedTest(span, self.selection.name, None, None, self.member, self.by_query, number)

    def holds(self, span: Span) -> program.Expr | None:
        """Return the test whether the entry covers the current key; None for a selection without `covers`."""
        covers = self.selection.covers
        return None if covers is None else self._clause(span, "covers", covers)

    def score(self, span: Span) -> program.Expr:
        """Return the score of the entry."""
        assert isinstance(self.selection.row.weights, program.Expr)
        return self._clause(span, "score", self.selection.row.weights)

    def _clause(self, span: Span, name: str, body: program.Expr) -> program.Expr:
        """Return a clause of the selection, evaluated for this entry."""
        family = self.selection.family
        parameters = (self.over.binder, *(() if family is None else (family.binder,)))
        arguments: tuple[program.Expr, ...] = (program.Local(span, self.binder),)
        arguments += () if self.member is None else (self.member,)
        return program.DefinitionUse(span, program.Definition(body.span, name, parameters, body), arguments)
