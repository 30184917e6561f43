"""Values that are linear in a state as sums of monomials: factors that read no state, and the state once or not at all.

Axes are labels. A label that the result has not is summed over, so a product over an axis and an outer product are both
plain lists of factors, and `dk` is never mistaken for `dv` where they are equally long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from attnc.compiler import ir
from attnc.compiler.ir import StateAt, Value
from attnc.compiler.node_words import plural
from attnc.compiler.value_nodes import apply, axes, number, select

Labels = tuple[int, ...]


class NonlinearError(Exception):
    """A value is not linear in the states. The message says where."""


@dataclass(frozen=True)
class Factor:
    """A value that reads no state, with a label for each of its axes."""

    value: Value
    labels: Labels


@dataclass(frozen=True)
class Monomial:
    """A product with a sign; `state`: at most one, with a label for each of its axes."""

    factors: tuple[Factor, ...]
    state: StateAt | None = None
    labels: Labels = ()
    negative: bool = False

    def times(self, other: Monomial) -> Monomial:
        """The product. Raises NonlinearError where both have a state."""
        if self.state is not None and other.state is not None:
            raise NonlinearError(f"a product of the states `{self.state.name}` and `{other.state.name}`")
        own = self if self.state is not None else other
        return Monomial(self.factors + other.factors, own.state, own.labels, negative=self.negative != other.negative)


def reads_state(node: Value) -> bool:
    """Whether a value depends on a state."""
    return any(isinstance(below, StateAt) for below in node.below)


@dataclass
class Expansion:
    """Expands values, and gives labels out."""

    _fresh: Iterator[int] = field(default_factory=count)

    def labels(self, number: int) -> Labels:
        """Labels that stand nowhere yet."""
        return tuple(next(self._fresh) for _ in range(number))

    def of(self, node: Value, labels: Labels) -> list[Monomial]:
        """A value whose axes have these labels. Raises NonlinearError."""
        if not reads_state(node) and (len(labels) < 2 or not _opens(node)):
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
                one, none = number(1.0), number(0.0)
                sides = []
                for side, mask in ((then, select(condition, one, none)), (otherwise, select(condition, none, one))):
                    factor = [Monomial((Factor(mask, ()),))]
                    sides += _product(factor, self.of(side, _matching(node, side, labels)))
                return sides
        raise NonlinearError(f"{_name(node)} of a state")

    def _apply(self, node: Value, op: str, operands: tuple[Value, ...], labels: Labels) -> list[Monomial]:
        if op == "div" and not reads_state(operands[1]):
            operands = operands[0], apply("div", number(1.0), operands[1])
            op = "mul"
        if op not in ("add", "sub", "neg", "mul"):
            raise NonlinearError(f"`{op}` of a state")
        found = [self.of(operand, _matching(node, operand, labels)) for operand in operands]
        match op:
            case "add":
                return found[0] + found[1]
            case "sub":
                return found[0] + _negated(found[1])
            case "neg":
                return _negated(found[0])
            case _:
                return _product(found[0], found[1])

    def _contract(self, node: ir.Contract, labels: Labels) -> list[Monomial]:
        (shared,) = self.labels(1)
        cut = len(axes(node.left)) - 1
        left, right = list(labels[:cut]), list(labels[cut:])
        left.insert(node.left_axis, shared)
        right.insert(node.right_axis, shared)
        return _product(self.of(node.left, tuple(left)), self.of(node.right, tuple(right)))


def _opens(node: Value) -> bool:
    """Whether a matrix is made of others, which are looked at."""
    return isinstance(node, ir.Outer) or (isinstance(node, ir.Apply) and node.op in ("add", "sub", "neg", "mul", "div"))


def _matching(node: Value, operand: Value, labels: Labels) -> Labels:
    """The labels of an operand's axes, which are some of the node's in their order."""
    found, rest = [], list(axes(operand))
    for label, axis in zip(labels, axes(node), strict=True):
        if rest and rest[0] == axis:
            rest.pop(0)
            found.append(label)
    return tuple(found)


def _product(a: list[Monomial], b: list[Monomial]) -> list[Monomial]:
    return [x.times(y) for x in a for y in b]


def _negated(terms: list[Monomial]) -> list[Monomial]:
    return [Monomial(t.factors, t.state, t.labels, negative=not t.negative) for t in terms]


def _name(node: Value) -> str:
    words: dict[type, str] = {ir.ValueReduce: "a sum", ir.Pick: "an entry"}
    return words.get(type(node), plural(node))


def product_of(values: list[Value]) -> Value:
    """The product of values, axes by name; 1 for none."""
    if not values:
        return number(1.0)
    first, *rest = values
    for value in rest:
        first = apply("mul", first, value)
    return first


__all__ = ["Expansion", "Factor", "Monomial", "NonlinearError", "product_of", "reads_state"]
