"""Constructors of floating-point values, and what they depend on."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypeIs

from attnc.compiler.ir import (
    VALUES,
    Apply,
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
    product = {dot(vector("q"), vector("k")), dot(vector("k"), vector("q"))}
    return (
        isinstance(score, Apply)
        and score.op == "mul"
        and len(score.operands) == 2
        and scale() in score.operands
        and bool(product & set(score.operands))
    )


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
