"""Values that are linear in the states, as sums of monomials: factors that read no state, times at most one state.

Axes have labels. A label that is not in the result is summed over, so that a contraction and an outer product are both
plain lists of factors, and `dk` is never mistaken for `dv` where their sizes are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from attnc.compiler import ir
from attnc.compiler.ir import StateAt, Value
from attnc.compiler.ir.node_words import plural
from attnc.compiler.ir.value_nodes import (
    apply,
    axes,
    number,
    select,
)

Labels = tuple[int, ...]


class NonlinearError(Exception):
    """Raised for a value that is not linear in the states. The message is a noun phrase: the nonlinear operation."""


@dataclass(frozen=True)
class Factor:
    """A value that reads no state, with a label for each of its axes."""

    value: Value
    labels: Labels


@dataclass(frozen=True)
class Monomial:
    """A signed product of factors and at most one state; `labels`: a label for each axis of the state."""

    factors: tuple[Factor, ...]
    state: StateAt | None = None
    labels: Labels = ()
    negative: bool = False

    def times(self, other: Monomial) -> Monomial:
        """Return the product of two monomials. Raises NonlinearError if both have a state."""
        if self.state is not None and other.state is not None:
            raise NonlinearError(f"a product of the states `{self.state.name}` and `{other.state.name}`")
        with_state = self if self.state is not None else other
        return Monomial(
            self.factors + other.factors, with_state.state, with_state.labels, negative=self.negative != other.negative
        )


def reads_state(node: Value) -> bool:
    """Check whether a value depends on a state."""
    return any(isinstance(child, StateAt) for child in node.below)


@dataclass
class Expansion:
    """Expands values into monomials, and hands out new labels."""

    _fresh: Iterator[int] = field(default_factory=count)

    def labels(self, number: int) -> Labels:
        """Return `number` new labels."""
        return tuple(next(self._fresh) for _ in range(number))

    def of(self, node: Value, labels: Labels) -> list[Monomial]:
        """Expand a value whose axes have the given labels into monomials. Raises NonlinearError."""
        if not reads_state(node) and (len(labels) < 2 or not _is_expanded(node)):
            return [Monomial((Factor(node, labels),))]
        match node:
            case StateAt():
                return [Monomial((), node, labels)]
            case ir.Apply(op=op, operands=operands):
                return self._apply(node, op, operands, labels)
            case ir.Outer(left=left, right=right):
                cut = len(axes(left))
                return _product(self.of(left, labels[:cut]), self.of(right, labels[cut:]))
            case ir.Contract():
                return self._contract(node, labels)
            case ir.Dot(left=left, right=right):
                shared = self.labels(1)
                return _product(self.of(left, shared), self.of(right, shared))
            case ir.FloatSelect(condition=condition, then=then, otherwise=otherwise):
                one, zero = number(1.0), number(0.0)
                sides = []
                for side, mask in ((then, select(condition, one, zero)), (otherwise, select(condition, zero, one))):
                    factor = [Monomial((Factor(mask, ()),))]
                    sides += _product(factor, self.of(side, _matching(node, side, labels)))
                return sides
        raise NonlinearError(f"{_in_words(node)} of a state")

    def _apply(self, node: Value, op: str, operands: tuple[Value, ...], labels: Labels) -> list[Monomial]:
        if op == "div" and not reads_state(operands[1]):
            operands = operands[0], apply("div", number(1.0), operands[1])
            op = "mul"
        if op not in ("add", "sub", "neg", "mul"):
            raise NonlinearError(f"`{op}` of a state")
        expanded = [self.of(operand, _matching(node, operand, labels)) for operand in operands]
        match op:
            case "add":
                return expanded[0] + expanded[1]
            case "sub":
                return expanded[0] + _negated(expanded[1])
            case "neg":
                return _negated(expanded[0])
            case _:
                return _product(expanded[0], expanded[1])

    def _contract(self, node: ir.Contract, labels: Labels) -> list[Monomial]:
        (shared,) = self.labels(1)
        cut = len(axes(node.left)) - 1
        left, right = list(labels[:cut]), list(labels[cut:])
        left.insert(node.left_axis, shared)
        right.insert(node.right_axis, shared)
        return _product(self.of(node.left, tuple(left)), self.of(node.right, tuple(right)))


def _is_expanded(node: Value) -> bool:
    """Check whether a matrix that reads no state is expanded further, because it is a sum or a product."""
    return isinstance(node, ir.Outer) or (isinstance(node, ir.Apply) and node.op in ("add", "sub", "neg", "mul", "div"))


def _matching(node: Value, operand: Value, labels: Labels) -> Labels:
    """Return the labels of an operand's axes, which are a subsequence of the node's axes."""
    matched, remaining = [], list(axes(operand))
    for label, axis in zip(labels, axes(node), strict=True):
        if remaining and remaining[0] == axis:
            remaining.pop(0)
            matched.append(label)
    return tuple(matched)


def _product(a: list[Monomial], b: list[Monomial]) -> list[Monomial]:
    return [x.times(y) for x in a for y in b]


def _negated(terms: list[Monomial]) -> list[Monomial]:
    return [Monomial(t.factors, t.state, t.labels, negative=not t.negative) for t in terms]


def _in_words(node: Value) -> str:
    words: dict[type, str] = {ir.ValueReduce: "a sum", ir.Pick: "an entry"}
    return words.get(type(node), plural(node))


def product_of(values: list[Value]) -> Value:
    """Return the product of values, broadcast by the names of their axes; 1 for no values."""
    if not values:
        return number(1.0)
    first, *others = values
    for value in others:
        first = apply("mul", first, value)
    return first
