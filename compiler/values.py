"""Constructors of floating-point values, and what they depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal

from typing_extensions import TypeIs

from attnc.compiler.ir import (
    VALUES,
    Apply,
    Attend,
    Dot,
    Element,
    HeadIndex,
    Index,
    Lookup,
    Node,
    Number,
    Pattern,
    Place,
    Ratio,
    Scale,
    Select,
    Tensor,
    Total,
    Truth,
    Value,
    Var,
    Vec,
    intern,
)


def number(value: float) -> Value:
    """A constant."""
    return intern(Number(float(value)))


def ratio(num: Index, den: Index) -> Value:
    """An exact number as a floating-point one."""
    return intern(Ratio(num, den))


def vector(name: Literal["q", "k", "v"]) -> Value:
    """The vector of this query or key."""
    return intern(Vec(name))


def scale() -> Value:
    """The call's scale."""
    return intern(Scale())


def element(tensor: Tensor, indices: tuple[Index, ...]) -> Value:
    """An element of a real input, or a vector of it."""
    return intern(Element(tensor, indices))


def apply(op: str, *operands: Value) -> Value:
    """A function, by its name."""
    return intern(Apply(op, operands))


def dot(left: Value, right: Value) -> Value:
    """The inner product of two vectors."""
    return intern(Dot(left, right))


def select(condition: Index, then: Value, otherwise: Value) -> Value:
    """One of two values."""
    if isinstance(condition, Truth):
        return then if condition.value else otherwise
    return then if then is otherwise else intern(Select(condition, then, otherwise))


def total(op: Literal["sum", "min", "max"], var: Var, low: Index, high: Index, condition: Index, body: Value) -> Value:
    """An aggregate over a range."""
    return intern(Total(op, var, low, high, condition, body))


def default_score() -> Value:
    """`scale * dot(q, k)`."""
    return apply("mul", scale(), dot(vector("q"), vector("k")))


def is_default(score: Value) -> bool:
    """Whether it is `scale * dot(q, k)`, however written."""
    return (
        isinstance(score, Apply)
        and score.op == "mul"
        and len(score.operands) == 2
        and scale() in score.operands
        and bool(set(_products()) & set(score.operands))
    )


def is_plain(node: Attend) -> bool:
    """Whether an attention is the softmax of `scale * dot(q, k)`."""
    return is_default(node.score) and node.weights.extra is None


@dataclass(frozen=True, slots=True)
class Additive:
    """A score `factor * dot(q, k) + bias`: `factor` is one number, `bias` (None: 0) reads no vector of q and k."""

    factor: Value
    bias: Value | None


def additive(score: Value) -> Additive | None:
    """A score as a multiple of `dot(q, k)` and the rest; None where it is something else."""
    factors, biases = _summands(score, number(1.0))
    if factors is None or not factors:
        return None
    return Additive(_sum(factors), _sum(biases) if biases else None)


def _sum(parts: list[Value]) -> Value:
    return reduce(lambda a, b: apply("add", a, b), parts)


def _summands(node: Value, factor: Value) -> tuple[list[Value] | None, list[Value]]:
    """The factors of `dot(q, k)` in a multiple of a node, and its other summands; None where there are none such."""
    match node:
        case Dot() if node in _products():
            return [factor], []
        case Apply(op="add" | "sub" as op, operands=(a, b)):
            ours, others = _summands(a, factor)
            more, rest = _summands(b, factor if op == "add" else apply("neg", factor))
            return None if ours is None or more is None else ours + more, others + rest
        case Apply(op="neg", operands=(a,)):
            return _summands(a, apply("neg", factor))
        case Apply(op="mul", operands=(a, b)):
            for one, other in ((a, b), (b, a)):
                if not reads(one) and not _has_inputs(one):
                    return _summands(other, apply("mul", factor, one))
        case Apply(op="div", operands=(a, b)) if not reads(b) and not _has_inputs(b):
            return _summands(a, apply("div", factor, b))
    if any(isinstance(below, Vec) for below in node.below):
        return None, []
    return [], [node if factor is number(1.0) else apply("mul", factor, node)]


def _products() -> tuple[Value, Value]:
    return dot(vector("q"), vector("k")), dot(vector("k"), vector("q"))


def _has_inputs(node: Value) -> bool:
    return any(isinstance(below, Element) for below in node.below)


def is_value(node: object) -> TypeIs[Value]:
    """Whether a lowered expression is floating point."""
    return isinstance(node, VALUES)


def reads(node: Value | Index) -> frozenset[str]:
    """What a node depends on: `q`, `k` (a place or its vector), `head`, `batch`."""
    found: set[str] = set()
    for below in node.below:
        found |= _own(below)
    return frozenset(found)


def _own(node: Node) -> set[str]:
    match node:
        case Place(name=name):
            return {name}
        case Vec(tensor=tensor):
            return {"q" if tensor == "q" else "k", "head", "batch"}
        case HeadIndex(name=name):
            return {"batch" if name == "batch" else "head"}
        case Element(tensor=tensor) | Lookup(tensor=tensor):
            return {"batch"} & set(tensor.dims)
        case _:
            return set()


def tensors_of(pattern: Pattern) -> tuple[Tensor, ...]:
    """The real inputs of a pattern."""
    return tuple(tensor for tensor in pattern.tensors if tensor.kind == "real")
