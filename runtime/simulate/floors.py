"""Density floors: how sparse a pattern gets as a real parameter vanishes, and the pairs that stay visible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any, cast

from attnc.spec.checks.measure import children
from attnc.spec.errors import SpecError
from attnc.spec.meaning.bind import bind
from attnc.spec.program import BoundProgram, DefinitionUse, Expr, Operation, ParameterRead
from attnc.spec.source import SourceFile, Span

Count = Callable[[BoundProgram], int]
"""A function that returns the number of visible pairs of a call."""

SMALLEST = Fraction(1, 10**6)
"""Factor applied to a parameter that must not be 0."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The density floor of one parameter: at `least`, `visible` of `pairs` pairs stay visible.

    `causes`: each alternative of the relation, with the pairs visible by it alone.
    """

    parameter: str
    least: Fraction
    visible: int
    pairs: int
    causes: tuple[tuple[str, int], ...]

    @property
    def density(self) -> float:
        """The fraction of pairs that is visible."""
        return self.visible / max(self.pairs, 1)

    def __str__(self) -> str:
        parts = [f"`{text}` alone {count / max(self.pairs, 1):.2%}" for text, count in self.causes if count]
        why = f": {', '.join(parts)}" if len(parts) > 1 else ""
        small = f"with {self.parameter} = {self.least}" if not self.least else f"however small `{self.parameter}` is"
        return f"the density does not fall below {self.density:.2%}, {small}{why}"


def find_floors(bound: BoundProgram, pairs: int, count: Count) -> tuple[Floor, ...]:
    """Return the floors of a pattern, one for each real parameter that its relation reads.

    `count` is called a few times per parameter. Raises the errors of `count`.
    """
    floors = []
    for parameter in bound.program.parameters:
        value = bound.values[parameter.name]
        if parameter.type.kind != "real" or parameter.type.dims or not isinstance(value, Fraction | int) or not value:
            continue
        smallest = _least(bound, parameter.name, Fraction(value))
        if smallest is None or not _reads(bound, parameter.name):
            continue
        at, least = smallest
        visible = count(least)
        causes = tuple((text, count(alone)) for text, alone in _alternatives(least))
        floors.append(Floor(parameter.name, at, visible, pairs, causes))
    return tuple(floors)


def _least(bound: BoundProgram, name: str, value: Fraction) -> tuple[Fraction, BoundProgram] | None:
    """Return the parameter at 0, or close to 0 where `require` refuses 0, and the pattern with it."""
    for least in (Fraction(0), value * SMALLEST):
        try:
            return least, bind(bound.program, {**bound.values, name: least})
        except SpecError:
            continue
    return None


def _reads(bound: BoundProgram, name: str) -> bool:
    """Check whether the relation reads a parameter."""
    stack, seen = list(bound.program.visible), set()
    while stack:
        expr = stack.pop()
        if isinstance(expr, ParameterRead) and expr.name == name:
            return True
        if id(expr) not in seen:
            seen.add(id(expr))
            stack.extend(children(expr))
            if isinstance(expr, DefinitionUse):
                stack.append(expr.definition.body)
    return False


def _alternatives(bound: BoundProgram) -> list[tuple[str, BoundProgram]]:
    """Return the pattern with one alternative of its relation at a time, each with its text."""
    program = bound.program
    if len(program.visible) != 1:
        return []
    (whole,) = program.visible
    alternatives = []
    for span, alone in _split(whole):
        round_ = program.round
        if round_ is not None:
            round_ = replace(round_, keep=_replaced(round_.keep, whole, alone, {}))
        reduced = replace(program, visible=(alone,), round=round_)
        alternatives.append((_text(bound, span), BoundProgram(reduced, bound.values)))
    return alternatives


def _replaced(node: Any, old: Expr, new: Expr, memo: dict[int, Any]) -> Any:
    """Return a part of a program with one expression replaced everywhere; unchanged parts keep their identity."""
    if node is old:
        return new
    if isinstance(node, tuple):
        parts = tuple(_replaced(part, old, new, memo) for part in node)
        return node if all(a is b for a, b in zip(parts, node, strict=True)) else parts
    if not is_dataclass(node) or isinstance(node, SourceFile | Span):
        return node
    if id(node) not in memo:
        values = {f.name: getattr(node, f.name) for f in fields(node)}
        changed = {name: _replaced(value, old, new, memo) for name, value in values.items()}
        same = all(changed[name] is values[name] for name in values)
        memo[id(node)] = node if same else cast("Any", type(node))(**changed)
    return memo[id(node)]


def _split(expr: Expr) -> list[tuple[Span, Expr]]:
    """Return the operands of `a or b`, also of `let x = a or b` within an `and`, each with the span of its own text."""
    if isinstance(expr, DefinitionUse) and not expr.arguments:
        inner = _split(expr.definition.body)
        return inner if len(inner) > 1 else [(expr.span, expr)]
    if not isinstance(expr, Operation):
        return [(expr.span, expr)]
    if expr.op == "or":
        return [part for operand in expr.operands for part in _split(operand)]
    if expr.op == "and":
        for i, operand in enumerate(expr.operands):
            parts = _split(operand)
            if len(parts) > 1:
                before, after = expr.operands[:i], expr.operands[i + 1 :]
                return [(span, replace(expr, operands=(*before, part, *after))) for span, part in parts]
    return [(expr.span, expr)]


def _text(bound: BoundProgram, span: Span) -> str:
    return " ".join(bound.program.source.text[span.start : span.end].split())
