"""The pattern IR: frozen nodes, interned by structure, so that equal nodes are one object.

Exact expressions (`Index`) are integers and truth values only: the lowering writes a rational as a numerator over a
positive denominator, and scales comparisons of rationals to integers. Build nodes with the folding constructors of
`ir.fold`; print them with `ir.print_ir`; `ir.verify_ir` checks the invariants of a `Pattern`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, cast
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.locks import fork_safe_lock

# --- interning -------------------------------------------------------------------------------------------------------

_interned: WeakValueDictionary[bytes, Node] = WeakValueDictionary()
_lock = fork_safe_lock()


@dataclass(frozen=True, eq=False)
class Node:
    """Base of interned nodes. `digest` depends on structure alone, the same in every process, except for `Data`."""

    digest: bytes = field(init=False, repr=False)
    _children: tuple[Index, ...] = field(init=False, repr=False)
    operand_fields: ClassVar[tuple[str, ...]] = ()

    def children(self) -> tuple[Index, ...]:
        """Return the operands, in order of evaluation."""
        return self._children

    @cached_property
    def below(self) -> tuple[Index, ...]:
        """Every distinct subexpression including this node, operands before users."""
        nodes: dict[Index, None] = {}
        stack: list[tuple[Index, bool]] = [(cast("Index", self), False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                nodes[node] = None
            elif node not in nodes:
                stack.append((node, True))
                stack.extend((child, False) for child in reversed(node.children()))
        return tuple(nodes)


@cache
def structure_fields(kind: Any) -> tuple[str, ...]:
    """Return the names of the fields that make up a node's structure."""
    return tuple(f.name for f in fields(kind) if f.init)


def _nodes(value: object) -> Iterator[Index]:
    """Yield the expressions in a field's value, which may be an expression or a nested tuple."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _nodes(item)
    elif isinstance(value, Node):
        yield cast("Index", value)


N = TypeVar("N", bound=Node)


def intern(node: N) -> N:
    """Return the unique node with this structure."""
    hasher = hashlib.blake2b(type(node).__name__.encode(), digest_size=16)
    kind: Any = type(node)
    for name in structure_fields(kind):
        _feed(hasher, getattr(node, name))
    digest = hasher.digest()
    with _lock:
        interned = _interned.get(digest)
        if interned is None:
            object.__setattr__(node, "digest", digest)
            object.__setattr__(node, "_children", tuple(_nodes([getattr(node, f) for f in node.operand_fields])))
            _interned[digest] = interned = node
    return interned  # type: ignore[return-value]  # same digest, same class


def _feed(hasher: Any, value: object) -> None:
    if isinstance(value, Node):
        hasher.update(b"n" + value.digest)
    elif isinstance(value, tuple):
        hasher.update(b"(%d" % len(value))
        for item in value:
            _feed(hasher, item)
    elif isinstance(value, Data):
        hasher.update(b"d%d" % id(value))
    else:
        text = f"{type(value).__name__}:{value}".encode()
        hasher.update(b"s%d:" % len(text) + text)


# --- exact expressions: integers -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Const(Node):
    """An integer."""

    value: int


@dataclass(frozen=True, eq=False)
class Position(Node):
    """The position of the current query or key. After `specialise`, a query's position is its row."""

    name: Literal["q", "k"]


@dataclass(frozen=True, eq=False)
class HeadIndex(Node):
    """The index of the current `head`, `kv_head` or `batch` entry."""

    name: str


@dataclass(frozen=True, eq=False)
class Extent(Node):
    """A size known at the call: `queries`, `keys`, `heads`, `kv_heads`, `group`, `dk`, `dv`, or a dimension by name."""

    name: str


@dataclass(frozen=True, eq=False)
class Var(Node):
    """The variable of a `Reduce`; `serial` distinguishes nested variables with the same name."""

    name: str
    serial: int


@dataclass(frozen=True, eq=False)
class Coord(Node):
    """The coordinate `(position - offset) // stride % extent`; the slowest axis has no `extent` (and no remainder)."""

    operand_fields = ("position", "offset", "stride", "extent")

    position: Index
    offset: Index
    stride: Index
    extent: Index | None
    name: str


@dataclass(frozen=True, eq=False)
class Linear(Node):
    """The normal form of sums: `Σ coefficient · term + constant`, with distinct non-Linear terms sorted by digest."""

    operand_fields = ("terms",)

    terms: tuple[tuple[Index, int], ...]
    constant: int


@dataclass(frozen=True, eq=False)
class Arith(Node):
    """An operation of `INTEGER_OPERATIONS`: mul, floordiv, mod, pow, min, max, abs, or a function of integers.

    floordiv and mod round down; the exponent of pow is ≥ 0.
    """

    operand_fields = ("operands",)

    op: str
    operands: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class TableRead(Node):
    """An entry of a constant table."""

    operand_fields = ("index",)

    values: tuple[int, ...]
    index: Index


@dataclass(frozen=True, eq=False)
class Lookup(Node):
    """An element of a tensor, with one index per dimension; token, key and query dimensions are indexed by position."""

    operand_fields = ("indices",)

    tensor: Tensor
    indices: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class DataRead(Node):
    """An element of an array: after `specialise`, the slice of a tensor for one batch entry and window."""

    operand_fields = ("indices",)

    data: Data
    indices: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class RoundToInt(Node):
    """The `floor` or `ceil` of a binary64 value of exact numbers; `specialise` replaces it by a table."""

    operand_fields = ("value",)

    op: Literal["floor", "ceil"]
    value: Value


@dataclass(frozen=True, eq=False)
class Reduce(Node):
    """The aggregate `op(body for var in low .. high if condition)`; op is sum, min, max, any or all.

    An empty aggregate is 0 for sum, false for any and true for all; an empty min or max is a fault.
    """

    operand_fields = ("low", "high", "condition", "body")

    op: Literal["sum", "min", "max", "any", "all"]
    var: Var
    low: Index
    high: Index
    condition: Index
    body: Index


# --- exact expressions: truth values ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Truth(Node):
    """The constant true or false."""

    value: bool


@dataclass(frozen=True, eq=False)
class Compare(Node):
    """The normal form of comparisons: `value >= 0` or `value == 0`."""

    operand_fields = ("value",)

    op: Literal["ge", "eq"]
    value: Index


@dataclass(frozen=True, eq=False)
class Bool(Node):
    """An n-ary `and` or `or`, evaluated left to right and only until the result is decided."""

    operand_fields = ("operands",)

    op: Literal["and", "or"]
    operands: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Not(Node):
    """The negation of a truth value."""

    operand_fields = ("operand",)

    operand: Index


@dataclass(frozen=True, eq=False)
class ExactSelect(Node):
    """The choice `then if condition else otherwise` of integers or truth values; only the chosen side is evaluated."""

    operand_fields = ("condition", "then", "otherwise")

    condition: Index
    then: Index
    otherwise: Index


@dataclass(frozen=True, eq=False)
class UnitCondition(Node):
    """The condition `keep` on the units that hold the query and the key; it has one value on all of a block.

    In `keep`, `q_vars` stand for the values of `q_units`, which depend on the query, and `k_vars` for the values of
    `k_units`, which depend on the key. `keep` reads no position: its queries and keys are variables of aggregates that
    run inside the units.
    """

    operand_fields = ("q_units", "k_units", "keep")

    q_vars: tuple[Var, ...]
    q_units: tuple[Index, ...]
    k_vars: tuple[Var, ...]
    k_units: tuple[Index, ...]
    keep: Index

    @property
    def units(self) -> tuple[tuple[Var, Index], ...]:
        """Every variable with the unit value for which it stands."""
        return tuple(zip(self.q_vars + self.k_vars, self.q_units + self.k_units, strict=True))


Index = (
    Const
    | Position
    | HeadIndex
    | Extent
    | Var
    | Coord
    | Linear
    | Arith
    | TableRead
    | Lookup
    | DataRead
    | RoundToInt
    | Reduce
    | Truth
    | Compare
    | Bool
    | Not
    | ExactSelect
    | UnitCondition
)


Unspecialised = HeadIndex | Extent | RoundToInt | Lookup
"""Kinds of node that `specialise` replaces."""


def not_an_integer(node: Unspecialised | Truth | Compare | Bool | Not | UnitCondition) -> NoReturn:
    """Refuse the kinds of node that are left after those of specialised integers, as a type checker holds."""
    raise AssertionError(f"not a specialised integer: {node}")


def not_a_truth(
    node: Unspecialised | Const | Position | Var | Coord | Linear | Arith | TableRead,
) -> NoReturn:
    """Refuse the kinds of node that are left after those of specialised conditions, as a type checker holds."""
    raise AssertionError(f"not a specialised condition: {node}")


def is_truth(node: Index) -> bool:
    """Whether the value of an exact expression is a truth value; otherwise it is an integer."""
    match node:
        case Truth() | Compare() | Bool() | Not() | UnitCondition():
            return True
        case ExactSelect():
            return is_truth(node.then)
        case Reduce():
            return node.op in ("any", "all")
        case Lookup():
            return node.tensor.kind == "bool"
        case DataRead():
            return node.data.array.dtype == np.bool_
        case _:
            return False


# --- tensors and data ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tensor(Node):
    """An input of a call. `dims`: fixed names (batch head kv_head query key token dk dv), other sizes, or numbers.

    `real` and `complex` tensors are read by values only. `learned`: the tensor is a parameter of a module.
    `refinement`: the range that the caller guarantees for entries: 0 to 1, at most 0, or above 0. `made`: the call
    derives the tensor from another input.
    """

    name: str
    kind: Literal["int", "bool", "real", "complex"]
    dims: tuple[str | int, ...]
    learned: bool = False
    refinement: Literal["unit", "log_decay", "positive"] | None = None
    made: Made | None = None

    @property
    def is_floating(self) -> bool:
        """Whether the tensor holds floating-point numbers."""
        return self.kind in ("real", "complex")


@dataclass(frozen=True, slots=True)
class Made:
    """The derivation of a tensor from a stable sort of tokens by the entries of the input `of`.

    `what`: "ranks" is the rank of each token, "order" the token at each rank, and "starts", for entries modulo `count`,
    the first rank of each number, followed by the number of tokens.
    """

    of: str
    what: Literal["ranks", "order", "starts"]
    count: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Data:
    """An array of int64 or bool that a relation reads, compared by identity. `cache` holds results of analysis.

    With a `cut`, `array` only has the shape and the type: each evaluation is given the tensor, of which it reads this
    part.
    """

    name: str
    array: NDArray[Any]
    cache: dict[str, object] = field(default_factory=dict, repr=False)
    cut: tuple[int | slice, ...] | None = None


# --- values (floating point) -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Number(Node):
    """A floating-point constant."""

    value: float


@dataclass(frozen=True, eq=False)
class Ratio(Node):
    """The exact number `num / den`, converted to floating point."""

    operand_fields = ("num", "den")

    num: Index
    den: Index


OUTSIDE = -(1 << 40)
"""The position of a key of zeros beyond the grid, which is not a token."""


@dataclass(frozen=True, eq=False)
class Vec(Node):
    """The q, k or v vector at a position, for a query head (k and v: for its kv head); zeros at `OUTSIDE`."""

    operand_fields = ("head", "at")

    tensor: Literal["q", "k", "v"]
    head: Index
    at: Index


@dataclass(frozen=True, eq=False)
class Scale(Node):
    """The call's scale; the default is dk^-1/2."""


@dataclass(frozen=True, eq=False)
class Element(Node):
    """An element of a real input; with fewer indices than dimensions, a vector over the remaining dimensions."""

    operand_fields = ("indices",)

    tensor: Tensor
    indices: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Apply(Node):
    """A function of numbers or of vectors, applied elementwise; numbers broadcast over vectors.

    `op`: add, sub, mul, div, neg, pow, abs, min, max, clamp, sqrt, exp, log, log2, tanh, sigmoid, softplus, relu, elu,
    silu, sin, cos, erf, logaddexp; share, a division in which 0 / 0 is 0; normalised and rms, which take a whole
    vector. In derivatives also sign, if_at_least (a, b, then, otherwise: `then` where a >= b) and chain, a product that
    is 0 where its first factor is 0, whatever the second. In recurrences also softmax, which takes a whole vector, and
    vectors broadcast over matrices along their axis.
    """

    operand_fields = ("operands",)

    op: str
    operands: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class Dot(Node):
    """The inner product of two vectors."""

    operand_fields = ("left", "right")

    left: Value
    right: Value


@dataclass(frozen=True, eq=False)
class Pick(Node):
    """An entry of a vector, or a row of a matrix."""

    operand_fields = ("vector", "index")

    vector: Value
    index: Index


@dataclass(frozen=True, eq=False)
class VectorPart(Node):
    """Part `number` of the `of` equal parts of a vector."""

    operand_fields = ("vector",)

    vector: Value
    number: int
    of: int


@dataclass(frozen=True, eq=False)
class Outer(Node):
    """The outer product of two vectors, a matrix."""

    operand_fields = ("left", "right")

    left: Value
    right: Value


@dataclass(frozen=True, eq=False)
class Contract(Node):
    """The product of two values summed over axis `left_axis` of `left` and `right_axis` of `right`; others in order."""

    operand_fields = ("left", "right")

    left: Value
    right: Value
    left_axis: int
    right_axis: int


@dataclass(frozen=True, eq=False)
class Diagonal(Node):
    """The matrix with a vector on its diagonal."""

    operand_fields = ("vector",)

    vector: Value


@dataclass(frozen=True, eq=False)
class StateAt(Node):
    """A state of a recurrence after `version` of its steps; a repeated step reads the running value as its version."""

    name: str
    version: int
    dims: tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Eye(Node):
    """The identity matrix of a size."""

    operand_fields = ("size",)

    size: Index


@dataclass(frozen=True, eq=False)
class Solve(Node):
    """The solution of a linear system, exact or after `steps` steps of conjugate gradients."""

    operand_fields = ("matrix", "vector")

    matrix: Value
    vector: Value
    steps: int | None = None


@dataclass(frozen=True, eq=False)
class FloatSelect(Node):
    """The choice `then if condition else otherwise` of floating-point values."""

    operand_fields = ("condition", "then", "otherwise")

    condition: Index
    then: Value
    otherwise: Value


@dataclass(frozen=True, eq=False)
class ValueReduce(Node):
    """The aggregate `op(body for var in low .. high if condition)`; an empty sum, min or max is 0, inf or -inf."""

    operand_fields = ("low", "high", "condition", "body")

    op: Literal["sum", "min", "max"]
    var: Var
    low: Index
    high: Index
    condition: Index
    body: Value


@dataclass(frozen=True, eq=False)
class VisibleReduce(Node):
    """The aggregate `op(body for k if condition)` over the visible keys of a row; op is sum, min or max.

    In `condition` and `body`, k is the running key. An empty sum, min or max is 0, inf or -inf.
    """

    operand_fields = ("condition", "body")

    op: Literal["sum", "min", "max"]
    condition: Index
    body: Value


@dataclass(frozen=True, eq=False)
class Ranking(Node):
    """A candidate's `rank` in its selection, the `mass` of the candidates before it, or its `score`."""

    name: Literal["rank", "mass", "score"]


Value = (
    Number
    | Ratio
    | Vec
    | Scale
    | Element
    | Apply
    | Dot
    | Pick
    | VectorPart
    | Outer
    | Contract
    | Diagonal
    | StateAt
    | Eye
    | Solve
    | FloatSelect
    | ValueReduce
    | VisibleReduce
    | Ranking
)
VALUES = (
    *(Number, Ratio, Vec, Scale, Element, Apply, Dot, Pick, VectorPart, Outer, Contract, Diagonal, StateAt, Eye, Solve),
    *(FloatSelect, ValueReduce, VisibleReduce, Ranking),
)


@dataclass(frozen=True, slots=True)
class Softmax:
    """Weights e^score / (Σ e^score + e^extra) over the visible keys; `extra` depends on the query, None means -inf."""

    extra: Value | None = None
