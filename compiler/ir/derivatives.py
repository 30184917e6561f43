"""Derivatives of scores, as expressions of the IR, which the backward pass evaluates.

A score is a formula over *atoms*: inner products, elements of real inputs, aggregates. This module computes the
derivative with respect to each atom, by the chain rule from the score down, with exact constants. Derivatives of atoms
with respect to q, k and the inputs move data rather than evaluate formulas, and are left to the executors.

The derivative of each function is written so that it does not overflow where the function does not. A test proves each
derivative with sympy (`tests/compiler/ir/test_derivatives.py`), whose own forms do overflow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, reduce
from math import isfinite

from attnc.compiler.ir import fold
from attnc.compiler.ir.nodes import (
    VALUES,
    Apply,
    Const,
    Element,
    FloatSelect,
    Index,
    Node,
    Number,
    Ratio,
    Value,
    Vec,
)
from attnc.compiler.ir.value_nodes import (
    apply,
    number,
    rank,
    select,
)
from attnc.spec.number_functions import NUMBER_FUNCTIONS


@dataclass(frozen=True, slots=True)
class Derivative:
    """The derivative `by` of a value with respect to `atom`, at the same query and key, where `where` holds.

    Elsewhere the value does not depend on the atom, and the atom and `by` may be undefined.
    """

    atom: Value
    by: Value
    where: Index


@lru_cache(maxsize=256)
def derivatives(value: Value) -> tuple[Derivative, ...]:
    """Return the derivatives of a number with respect to each atom that depends on q, k, v or a real input.

    At a kink, the derivative is that of the side on which the function is constant; of equal operands of an extreme,
    the first operand receives the derivative.
    """
    changes: dict[Node, list[_Change]] = (
        {value: [_Change(fold.truth(True), Fraction(1), None)]} if _varies(value) else {}
    )
    result: list[Derivative] = []
    for node in reversed(value.below):  # users before operands
        if node not in changes:
            continue
        assert isinstance(node, VALUES)
        change = _sum(changes.pop(node))
        parts = _operands(node, change) if change.coefficient else []
        if parts is None:
            result.append(Derivative(node, change.whole(), change.where))
            continue
        for operand, part in parts:
            if _varies(operand) and part.coefficient:
                changes.setdefault(operand, []).append(part)
    return tuple(reversed(result))


def _varies(node: Value) -> bool:
    return any(isinstance(below, Vec | Element) for below in node.below)


# --- changes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    """A factor of the chain rule: `coefficient * value` where `where` holds, 0 elsewhere; a value of None is 1."""

    where: Index
    coefficient: Fraction
    value: Value | None

    def whole(self) -> Value:
        constant = number(float(self.coefficient))
        if self.value is None or not self.coefficient:
            return constant
        if self.coefficient == -1:
            return apply("neg", self.value)
        return self.value if self.coefficient == 1 else apply("mul", constant, self.value)

    def times(self, factor: Value) -> _Change:
        constant = _constant(factor)
        if constant is not None:
            return replace(self, coefficient=self.coefficient * constant)
        if self.value is None:
            return replace(self, value=factor)
        return replace(self, value=apply("chain" if _may_vanish(self.value) else "mul", self.value, factor))

    def over(self, divisor: Value) -> _Change:
        constant = _constant(divisor)
        if constant:
            return replace(self, coefficient=self.coefficient / constant)
        if self.value is not None and _may_vanish(self.value):
            return self.times(apply("div", number(1.0), divisor))
        return replace(self, value=apply("div", number(1.0) if self.value is None else self.value, divisor))

    def negative(self) -> _Change:
        return replace(self, coefficient=-self.coefficient)

    def chosen(self, condition: Index) -> _Change:
        """Return this change restricted to a condition."""
        return replace(self, where=fold.conjunction(self.where, condition))

    def on_side(self, condition: tuple[Value, Value], holds: bool) -> _Change:
        """Return this change where the first number is at least the second (not `holds`: is less), and 0 elsewhere."""
        factor = number(1.0) if self.value is None else self.value
        sides = (factor, number(0.0)) if holds else (number(0.0), factor)
        return replace(self, value=apply("if_at_least", *condition, *sides))


def _constant(value: Value) -> Fraction | None:
    """The exact value of a finite constant; None for any other value."""
    match value:
        case Number(value=finite) if isfinite(finite):
            return Fraction(finite)
        case Ratio(num=Const(value=num), den=Const(value=den)) if den:
            return Fraction(num, den)
        case _:
            return None


def _may_vanish(value: Value) -> bool:
    """Whether a value is 0 beyond a kink, where the number that it multiplies may be NaN."""
    return any(isinstance(below, FloatSelect) or _is_kink(below) for below in value.below)


def _is_kink(node: Node) -> bool:
    return isinstance(node, Apply) and node.op == "if_at_least"


def _sum(changes: list[_Change]) -> _Change:
    coefficients: dict[tuple[Index, Value | None], Fraction] = {}
    for change in changes:
        key = change.where, change.value
        coefficients[key] = coefficients.get(key, Fraction(0)) + change.coefficient
    parts = [_Change(where, coefficient, value) for (where, value), coefficient in coefficients.items() if coefficient]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _Change(fold.truth(True), Fraction(0), None)
    everywhere = all(part.where is parts[0].where for part in parts)
    where = parts[0].where if everywhere else fold.disjunction(*(part.where for part in parts))
    terms = [part.whole() if everywhere else select(part.where, part.whole(), number(0.0)) for part in parts]
    return _Change(where, Fraction(1), reduce(lambda a, b: apply("add", a, b), terms))


# --- functions -------------------------------------------------------------------------------------------------------


def _operands(node: Value, change: _Change) -> Iterable[tuple[Value, _Change]] | None:
    """Return the operands of a node, each with the change that it receives; None for an atom."""
    if isinstance(node, FloatSelect):
        other = fold.negation(node.condition)
        return [(node.then, change.chosen(node.condition)), (node.otherwise, change.chosen(other))]
    if not isinstance(node, Apply) or any(rank(operand) for operand in node.operands):
        return None
    match node.op, node.operands:
        case "min" | "max", operands:
            return _extreme_changes(node.op, operands, change)
        case "clamp", (a, low, high):
            raised = apply("max", a, low)
            upper = list(_extreme_changes("min", (raised, high), change))
            return [*_extreme_changes("max", (a, low), upper[0][1]), upper[1]]
        case op, (a, b):
            return _binary_changes(op, node, (a, b), change)
        case op, (x,):
            return _unary_changes(op, node, x, change)
        case _:
            return None


def _binary_changes(
    op: str, node: Value, operands: tuple[Value, Value], change: _Change
) -> Iterable[tuple[Value, _Change]] | None:
    """Return the operands of a function of two numbers with their changes; `node` is the function's value."""
    a, b = operands
    match op:
        case "add":
            return [(a, change), (b, change)]
        case "sub":
            return [(a, change), (b, change.negative())]
        case "mul":
            return [(a, change.times(b)), (b, change.times(a))]
        case "div":
            return [(a, change.over(b)), (b, change.times(node).over(b).negative())]
        case "pow":
            return _power_changes(node, a, b, change)
        case _:
            return _function_changes(op, node, operands, change)


def _unary_changes(op: str, node: Value, x: Value, change: _Change) -> Iterable[tuple[Value, _Change]] | None:
    """Return the operand of a function of one number with its change; `node` is the function's value."""
    match op:
        case "neg":
            return [(x, change.negative())]
        case "relu":
            return [(x, change.on_side((number(0.0), x), False))]
        case _:
            return _function_changes(op, node, (x,), change)


def _function_changes(
    op: str, node: Value, operands: tuple[Value, ...], change: _Change
) -> Iterable[tuple[Value, _Change]] | None:
    """Return the operands of a function with their changes by its slopes; None for other operations."""
    function = NUMBER_FUNCTIONS.get(op)
    if function is None or not function.slopes:
        return None
    changes = []
    for operand, slope in zip(operands, function.slopes, strict=True):
        operand_change = change.times(_lifted(slope(_formula, *operands, node)))
        if function.divisor is not None:
            operand_change = operand_change.over(_lifted(function.divisor(_formula, *operands, node)))
        changes.append((operand, operand_change))
    return changes


def _formula(op: str, *operands: Value | float) -> Value:
    return apply(op, *map(_lifted, operands))


def _lifted(x: Value | float) -> Value:
    return number(x) if isinstance(x, float) else x


def _power_changes(node: Value, base: Value, exponent: Value, change: _Change) -> Iterable[tuple[Value, _Change]]:
    constant = _constant(exponent)
    lower = apply("sub", exponent, number(1.0)) if constant is None else number(float(constant - 1))
    lower_power = base if constant == 2 else apply("pow", base, lower)
    # a power of 0 stays 0 when its exponent changes, although log(0) is infinite
    exponent_change = change.on_side((number(0.0), base), False).times(apply("mul", node, apply("log", base)))
    return [(base, change.times(exponent).times(lower_power)), (exponent, exponent_change)]


def _extreme_changes(op: str, operands: tuple[Value, ...], change: _Change) -> Iterable[tuple[Value, _Change]]:
    """Return the operands of a minimum or maximum with their changes; of equal operands the first receives all."""
    *rest, last = operands
    if not rest:
        return [(last, change)]
    best = rest[0] if len(rest) == 1 else apply(op, *rest)
    condition = (best, last) if op == "max" else (last, best)
    return [
        *_extreme_changes(op, tuple(rest), change.on_side(condition, True)),
        (last, change.on_side(condition, False)),
    ]
