"""Derivatives of scores, as expressions of the IR: what a backward pass computes of a score, besides sums.

A score is a formula of *atoms*: inner products, elements of real inputs, aggregates. Here is how it changes with each
of them, by the chain rule from the score down, constants kept exact. How an atom changes with q, k and the inputs is
a matter of moving data, not of formulas, and is left to whoever runs them.

The derivative of each function is written so that it does not overflow where the function does not. That it is the
derivative is proved by sympy (`tests/compiler/test_derivatives.py`), whose own forms do overflow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, reduce
from math import isfinite, log

from attnc.compiler import fold
from attnc.compiler.ir import VALUES, Apply, Const, Element, FloatSelect, Index, Node, Number, Ratio, Value, Vec
from attnc.compiler.value_nodes import apply, number, rank, select


@dataclass(frozen=True, slots=True)
class Derivative:
    """`by`: how fast a value changes with `atom`, both numbers of the same query and key, where `where` holds.

    Elsewhere the value does not depend on the atom, and neither it nor `by` need have a value.
    """

    atom: Value
    by: Value
    where: Index


@lru_cache(maxsize=256)
def derivatives(value: Value) -> tuple[Derivative, ...]:
    """How a number changes with each of its atoms that depends on q, k, v or a real input.

    At a point where a function has a kink: as for the side on which it is constant, or of equal operands the first.
    """
    changes: dict[Node, list[_Change]] = (
        {value: [_Change(fold.truth(True), Fraction(1), None)]} if _varies(value) else {}
    )
    found: list[Derivative] = []
    for node in reversed(value.below):  # users before operands
        if node not in changes:
            continue
        assert isinstance(node, VALUES)
        change = _sum(changes.pop(node))
        parts = _operands(node, change) if change.coefficient else []
        if parts is None:
            found.append(Derivative(node, change.whole(), change.where))
            continue
        for operand, part in parts:
            if _varies(operand) and part.coefficient:
                changes.setdefault(operand, []).append(part)
    return tuple(reversed(found))


def _varies(node: Value) -> bool:
    return any(isinstance(below, Vec | Element) for below in node.below)


# --- changes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    """`coefficient * value` where `where` holds, 0 elsewhere; a value of None is 1."""

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
        """Itself where a condition holds too."""
        return replace(self, where=fold.conjunction(self.where, condition))

    def on_side(self, condition: tuple[Value, Value], holds: bool) -> _Change:
        """Itself where the first number is at least the second (or, for not `holds`, is not), 0 elsewhere."""
        own = number(1.0) if self.value is None else self.value
        sides = (own, number(0.0)) if holds else (number(0.0), own)
        return replace(self, value=apply("if_at_least", *condition, *sides))


def _constant(value: Value) -> Fraction | None:
    """A finite constant, exactly."""
    match value:
        case Number(value=found) if isfinite(found):
            return Fraction(found)
        case Ratio(num=Const(value=num), den=Const(value=den)) if den:
            return Fraction(num, den)
        case _:
            return None


def _may_vanish(value: Value) -> bool:
    """Whether it is 0 beyond a kink: there what it is multiplied with may be no number."""
    return any(isinstance(below, FloatSelect) or _is_kink(below) for below in value.below)


def _is_kink(node: Node) -> bool:
    return isinstance(node, Apply) and node.op == "if_at_least"


def _sum(changes: list[_Change]) -> _Change:
    alike: dict[tuple[Index, Value | None], Fraction] = {}
    for change in changes:
        key = change.where, change.value
        alike[key] = alike.get(key, Fraction(0)) + change.coefficient
    parts = [_Change(where, coefficient, value) for (where, value), coefficient in alike.items() if coefficient]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _Change(fold.truth(True), Fraction(0), None)
    everywhere = all(part.where is parts[0].where for part in parts)
    where = parts[0].where if everywhere else fold.disjunction(*(part.where for part in parts))
    wholes = [part.whole() if everywhere else select(part.where, part.whole(), number(0.0)) for part in parts]
    return _Change(where, Fraction(1), reduce(lambda a, b: apply("add", a, b), wholes))


# --- functions -------------------------------------------------------------------------------------------------------


def _operands(node: Value, change: _Change) -> Iterable[tuple[Value, _Change]] | None:
    """Return the operands of a node with the change that each receives; None for an atom."""
    if isinstance(node, FloatSelect):
        other = fold.negation(node.condition)
        return [(node.then, change.chosen(node.condition)), (node.otherwise, change.chosen(other))]
    if not isinstance(node, Apply) or any(rank(operand) for operand in node.operands):
        return None
    match node.op, node.operands:
        case "min" | "max", operands:
            return _of_extreme(node.op, operands, change)
        case "clamp", (a, low, high):
            raised = apply("max", a, low)
            upper = list(_of_extreme("min", (raised, high), change))
            return [*_of_extreme("max", (a, low), upper[0][1]), upper[1]]
        case op, (a, b):
            return _of_two(op, node, (a, b), change)
        case op, (x,):
            return _of_one(op, node, x, change)
        case _:
            return None


def _of_two(
    op: str, node: Value, operands: tuple[Value, Value], change: _Change
) -> Iterable[tuple[Value, _Change]] | None:
    """The functions of two numbers; `node` is the function of them."""
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
            return _of_power(node, a, b, change)
        case "logaddexp":
            gap = apply("sub", a, b)
            return [(a, change.times(_sigmoid(gap))), (b, change.times(_sigmoid(apply("neg", gap))))]
        case _:
            return None


def _of_one(op: str, node: Value, x: Value, change: _Change) -> Iterable[tuple[Value, _Change]] | None:
    """The functions of one number; `node` is the function of `x`."""
    match op:
        case "neg":
            return [(x, change.negative())]
        case "relu":
            return [(x, change.on_side((number(0.0), x), False))]
        case "sqrt":
            return [(x, change.times(number(0.5)).over(node))]
        case "log":
            return [(x, change.over(x))]
        case "log2":
            return [(x, change.times(number(1 / log(2))).over(x))]
    slope = _slope(op, node, x)
    return None if slope is None else [(x, change.times(slope))]


def _slope(op: str, node: Value, x: Value) -> Value | None:
    one = number(1.0)
    match op:
        case "exp":
            return node
        case "tanh":
            return apply("sub", one, apply("mul", node, node))
        case "sigmoid":
            return apply("mul", node, _sigmoid(apply("neg", x)))
        case "softplus":
            return _sigmoid(x)
        case "elu":
            return apply("exp", apply("min", x, number(0.0)))
        case "silu":
            return apply("mul", _sigmoid(x), apply("add", one, apply("mul", x, _sigmoid(apply("neg", x)))))
        case "abs":
            return apply("sign", x)
        case "sin":
            return apply("cos", x)
        case "cos":
            return apply("neg", apply("sin", x))
        case _:
            return None


def _sigmoid(x: Value) -> Value:
    return apply("sigmoid", x)


def _of_power(node: Value, base: Value, exponent: Value, change: _Change) -> Iterable[tuple[Value, _Change]]:
    constant = _constant(exponent)
    lower = apply("sub", exponent, number(1.0)) if constant is None else number(float(constant - 1))
    below = base if constant == 2 else apply("pow", base, lower)
    # a power of 0 stays 0 when its exponent changes, whatever the logarithm says
    of_exponent = change.on_side((number(0.0), base), False).times(apply("mul", node, apply("log", base)))
    return [(base, change.times(exponent).times(below)), (exponent, of_exponent)]


def _of_extreme(op: str, operands: tuple[Value, ...], change: _Change) -> Iterable[tuple[Value, _Change]]:
    """Return the operands of a minimum or maximum with their changes; the first of equal ones receives all of it."""
    *rest, last = operands
    if not rest:
        return [(last, change)]
    best = rest[0] if len(rest) == 1 else apply(op, *rest)
    condition = (best, last) if op == "max" else (last, best)
    return [*_of_extreme(op, tuple(rest), change.on_side(condition, True)), (last, change.on_side(condition, False))]
