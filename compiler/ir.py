"""The pattern IR: frozen nodes, interned by structure, so that equal nodes are one object.

Exact expressions (`Index`) are integers and truth values only: a rational is a numerator over a positive denominator,
and comparisons of rationals have been scaled to integers by the lowering. Build nodes with the folding constructors of
`compiler.fold`; print them with `compiler.print_ir`; `compiler.verify_ir` says what must hold of a `Pattern`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from typing import Any, ClassVar, Literal, TypeVar, cast
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.locks import fork_safe_lock
from attnc.spec.source import Span

# --- interning -------------------------------------------------------------------------------------------------------

_interned: WeakValueDictionary[bytes, Node] = WeakValueDictionary()
_lock = fork_safe_lock()


@dataclass(frozen=True, eq=False)
class Node:
    """Base of interned nodes. `digest` is the same in every process for the same structure (but for `Data`)."""

    digest: bytes = field(init=False, repr=False)
    _children: tuple[Index, ...] = field(init=False, repr=False)
    operand_fields: ClassVar[tuple[str, ...]] = ()

    def children(self) -> tuple[Index, ...]:
        """The operands, in order of evaluation."""
        return self._children

    @cached_property
    def below(self) -> tuple[Index, ...]:
        """Every distinct node below and including this one, operands before users."""
        found: dict[Index, None] = {}
        stack: list[tuple[Index, bool]] = [(cast("Index", self), False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                found[node] = None
            elif node not in found:
                stack.append((node, True))
                stack.extend((child, False) for child in reversed(node.children()))
        return tuple(found)


@cache
def _own_fields(kind: Any) -> tuple[str, ...]:
    """The fields that make up a node's structure."""
    return tuple(f.name for f in fields(kind) if f.init)


def _nodes(value: object) -> Iterator[Index]:
    """The expressions in a field: itself, or those of a tuple."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _nodes(item)
    elif isinstance(value, Node):
        yield cast("Index", value)


N = TypeVar("N", bound=Node)


def intern(node: N) -> N:
    """The one node with this structure."""
    hasher = hashlib.blake2b(type(node).__name__.encode(), digest_size=16)
    kind: Any = type(node)
    for name in _own_fields(kind):
        _feed(hasher, getattr(node, name))
    digest = hasher.digest()
    with _lock:
        known = _interned.get(digest)
        if known is None:
            object.__setattr__(node, "digest", digest)
            object.__setattr__(node, "_children", tuple(_nodes([getattr(node, f) for f in node.operand_fields])))
            _interned[digest] = known = node
    return known  # type: ignore[return-value]  # same digest, same class


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
    """The position of this query or key. After `specialise`, the query's is its row."""

    name: Literal["q", "k"]


@dataclass(frozen=True, eq=False)
class HeadIndex(Node):
    """`head`, `kv_head` or `batch`."""

    name: str


@dataclass(frozen=True, eq=False)
class Extent(Node):
    """A size known at the call: `queries keys heads kv_heads group dk dv`, a named dimension, a segment's length."""

    name: str


@dataclass(frozen=True, eq=False)
class Var(Node):
    """The variable of a `Reduce`; `serial` tells nested ones of a name apart."""

    name: str
    serial: int


@dataclass(frozen=True, eq=False)
class Coord(Node):
    """`(position - offset) // stride % extent`: a coordinate; the slowest axis has no `extent` (and no remainder)."""

    operand_fields = ("position", "offset", "stride", "extent")

    position: Index
    offset: Index
    stride: Index
    extent: Index | None
    name: str


@dataclass(frozen=True, eq=False)
class Linear(Node):
    """`Σ coefficient · term + constant`: the normal form of sums. Terms are distinct, not Linear, sorted by digest."""

    operand_fields = ("terms",)

    terms: tuple[tuple[Index, int], ...]
    constant: int


@dataclass(frozen=True, eq=False)
class Arith(Node):
    """mul floordiv mod pow min max abs isqrt bitlen bitand bitor xor; `//` and `%` floor; `pow` has exponent ≥ 0."""

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
    """An element of a tensor, one index for every dimension; those into token, key and query are positions."""

    operand_fields = ("indices",)

    tensor: Tensor
    indices: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class DataRead(Node):
    """An element of data at hand (a tensor's slice for one batch entry and head), after `specialise`."""

    operand_fields = ("indices",)

    data: Data
    indices: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class RoundToInt(Node):
    """`floor` or `ceil` of a binary64 value of exact numbers; `specialise` makes a table of it."""

    operand_fields = ("value",)

    op: Literal["floor", "ceil"]
    value: Value


@dataclass(frozen=True, eq=False)
class Reduce(Node):
    """`op(body for var in low .. high if condition)`; op is sum, min, max, any or all.

    Of nothing: 0 for sum, false for any, true for all; min and max of nothing are faults.
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
    """True or false."""

    value: bool


@dataclass(frozen=True, eq=False)
class Compare(Node):
    """`value >= 0` or `value == 0`: the normal form of comparisons."""

    operand_fields = ("value",)

    op: Literal["ge", "eq"]
    value: Index


@dataclass(frozen=True, eq=False)
class Bool(Node):
    """n-ary `and` or `or`, left to right: a later operand is asked only where the earlier ones leave it open."""

    operand_fields = ("operands",)

    op: Literal["and", "or"]
    operands: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Not(Node):
    """Negation."""

    operand_fields = ("operand",)

    operand: Index


@dataclass(frozen=True, eq=False)
class ExactSelect(Node):
    """`then if condition else otherwise`, of integers or of truth values; only the chosen side is asked."""

    operand_fields = ("condition", "then", "otherwise")

    condition: Index
    then: Index
    otherwise: Index


@dataclass(frozen=True, eq=False)
class UnitCondition(Node):
    """`keep` at the units around the place: a truth value that is the same all over a block.

    `q_vars` and `k_vars` stand in `keep` for the values of `q_units`, which depend on the query, and `k_units`, on the
    key. `keep` itself reads no place: in it queries and keys are variables of aggregates, which run inside the units.
    """

    operand_fields = ("q_units", "k_units", "keep")

    q_vars: tuple[Var, ...]
    q_units: tuple[Index, ...]
    k_vars: tuple[Var, ...]
    k_units: tuple[Index, ...]
    keep: Index

    @property
    def units(self) -> tuple[tuple[Var, Index], ...]:
        """Every variable with the value it stands for."""
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


def is_truth(node: Index) -> bool:
    """Whether the node's value is a truth value (else an integer)."""
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
    """An input of each call; `dims` are fixed names (batch head kv_head query key token dk dv), new sizes, or numbers.

    `real` and `complex` ones enter values only. `learned`: a module owns it. `refinement`: what its entries
    promise to be, 0 to 1, at most 0, or above 0. `made`: it is not given, but made of one that
    is.
    """

    name: str
    kind: Literal["int", "bool", "real", "complex"]
    dims: tuple[str | int, ...]
    learned: bool = False
    refinement: Literal["unit", "log_decay", "positive"] | None = None
    made: Made | None = None

    @property
    def is_floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.kind in ("real", "complex")


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor of the call: tokens sorted by the entries of the input `of`, ties to the earlier one.

    `what`: the place of each token, the token at each place, or, of entries modulo `count`, where each of these numbers
    begins among the places, with their end.
    """

    of: str
    what: Literal["ranks", "order", "starts"]
    count: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Data:
    """An array of int64 or bool that a relation reads; identity is equality. `cache` keeps what analysis derives."""

    name: str
    array: NDArray[Any]
    cache: dict[str, object] = field(default_factory=dict, repr=False)


# --- values (floating point) -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Number(Node):
    """A constant."""

    value: float


@dataclass(frozen=True, eq=False)
class Ratio(Node):
    """An exact number, `num / den`, on its way into floating point."""

    operand_fields = ("num", "den")

    num: Index
    den: Index


OUTSIDE = -(1 << 40)
"""The position of a key that is no token, beyond the grid."""


@dataclass(frozen=True, eq=False)
class Vec(Node):
    """The vector of q, k or v of a query head, at a position; k and v: of its kv head; at `OUTSIDE` zeros."""

    operand_fields = ("head", "at")

    tensor: Literal["q", "k", "v"]
    head: Index
    at: Index


@dataclass(frozen=True, eq=False)
class Scale(Node):
    """The call's scale, dk^-1/2 unless given."""


@dataclass(frozen=True, eq=False)
class Element(Node):
    """An element of a real input: an index for each dimension, or for the first ones; then it is a vector."""

    operand_fields = ("indices",)

    tensor: Tensor
    indices: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Apply(Node):
    """A function of numbers, or of vectors entry by entry, a number going with a vector.

    add sub mul div neg pow abs min max clamp sqrt exp log log2 tanh sigmoid softplus relu elu silu sin cos logaddexp;
    share, a division in which 0 / 0 is 0; and of a vector as a whole, normalised and rms. In derivatives also sign,
    if_at_least (of a, b, then, otherwise: `then` where a >= b) and chain, a product that is 0 where its first factor
    is, whatever the second. In recurrences also softmax, of a vector as a whole, and a vector goes with a matrix over
    its axis.
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
    """The part with this number of `of` equal ones of a vector."""

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
    """The sum over an axis of each: axis `left_axis` of the one, `right_axis` of the other; the other axes in order."""

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
    """A state of a recurrence after so many of its steps; in a repeated step its own version is the running one."""

    name: str
    version: int
    dims: tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Eye(Node):
    """The unit matrix of a size."""

    operand_fields = ("size",)

    size: Index


@dataclass(frozen=True, eq=False)
class Solve(Node):
    """The solution of a linear system, exact or after `steps` of conjugate gradients."""

    operand_fields = ("matrix", "vector")

    matrix: Value
    vector: Value
    steps: int | None = None


@dataclass(frozen=True, eq=False)
class FloatSelect(Node):
    """`then if condition else otherwise`."""

    operand_fields = ("condition", "then", "otherwise")

    condition: Index
    then: Value
    otherwise: Value


@dataclass(frozen=True, eq=False)
class ValueReduce(Node):
    """`op(body for var in low .. high if condition)`; op is sum, min or max. Of nothing: 0, inf, -inf."""

    operand_fields = ("low", "high", "condition", "body")

    op: Literal["sum", "min", "max"]
    var: Var
    low: Index
    high: Index
    condition: Index
    body: Value


@dataclass(frozen=True, eq=False)
class VisibleReduce(Node):
    """`op(body for k if condition)` over the keys that the row sees; op is sum, min or max. Of nothing: 0, inf, -inf.

    The place k in `condition` and `body` is the one that runs.
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
    """Weights e^score / (Σ e^score + e^extra) over the visible keys; `extra` is a value of the query, None for -inf."""

    extra: Value | None = None


# --- the graph -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A stretch of positions with axes (name, extent), slowest first. A run-time extent is an `Extent`."""

    name: str | None
    axes: tuple[tuple[str, Index], ...]
    offset: Index
    length: Index


Loop = tuple[Var, Index, Index]
"""A variable and the range that it runs over."""


@dataclass(frozen=True, slots=True, eq=False)
class Attend:
    """One attention: `Σ weights · value` over the visible keys.

    `keys`: how many there are where they are no tokens, but numbered units, places of a range, or tokens with zeros
    around them; `key_of`: the number of the one that the token k is in, where tokens are in some. `stack`: a row gives
    a number for each value of a variable. `family`: there is one for each.
    """

    name: str
    visible: Index
    score: Value
    weights: Softmax | Value
    value: Value
    keys: Index | None = None
    key_of: Index | None = None
    stack: Loop | None = None
    family: Loop | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The blocks that each row selects: `given`, a truth tensor by batch entry, heads, row and block.

    Of heads it has `head`, `kv_head`, or no dimension, as few as the choice depends on. In its expressions place q is
    the row, place k what is chosen. `rows`: how many there are where they are no queries; `row_of`: the row that the
    query q is in. `items`: how many places, where they are no tokens; `item_of`: the one that the token k is in.

    `candidates` holds for what is ranked by `score`, all rows of a head (`pairs`) or each by itself; of them those are
    chosen for which `keep` is not 0, and besides all for which `always` holds.
    """

    name: str
    given: Tensor
    rows: Index | None
    row_of: Index
    items: Index | None
    item_of: Index | None
    score: Value
    candidates: Index
    keep: Value
    always: Index
    pairs: bool = False

    @property
    def by_heads(self) -> str | None:
        """The dimension of heads."""
        return next((dim for dim in self.given.dims if dim in ("head", "kv_head")), None)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A state of a recurrence, for each batch entry and head; every entry is `start` before the first token."""

    name: str
    dims: tuple[str | int, ...]
    start: float
    is_complex: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The version of a state that follows `version`: once, or as often as `repeat` says, one after another."""

    state: str
    version: int
    value: Value
    repeat: Loop | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Recur:
    """Tokens one after another, by increasing `order` (None: their places). For each: `steps`, and what it gets.

    `read` and the values of steps are of the token at place q and of versions of the states. Where `reset` holds of a
    token the states are as at the start before it. `member`: which of a family of that name, counted from 0.
    """

    name: str
    states: tuple[State, ...]
    steps: tuple[Step, ...]
    read: Value
    order: Index | None = None
    reset: Index | None = None
    member: int | None = None


BOUNDARIES = "cu_seqlens.size"
"""The dimension of cumulative lengths."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenExtents:
    """A pattern whose extents of a grid are left open: each is a size `Extent(name)`, which has its value in `sizes`.

    `extents` are those of the axes. `known` gives for a relation of the pattern the one that it is for these sizes:
    with the values put in, that is the relation itself, so one that was changed since is not found here.
    """

    sizes: Mapping[str, int]
    extents: tuple[Index, ...]
    known: Mapping[Index, Index]

    @property
    def numbers(self) -> dict[Index, Index]:
        """The values of the sizes, as what to put in."""
        return {intern(Extent(name)): intern(Const(value)) for name, value in self.sizes.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """A whole pattern, parameters bound. `requirements` are conditions decided at the call, each with its place.
    `head_lists` are the parameters with an entry a head, and their lengths.

    `nodes` stand in the order in which they read each other. The result is `combine`, with `lse` where it has one, or
    the output of the only node. What a node gave is read as a tensor of its name (`compiler.values.output`).

    `documents` has an id for each token, or, where its dimension is `BOUNDARIES`, the cumulative lengths of sequences.

    `selections` are computed before what reads their tensors.

    A recurrence has `recur` in place of nodes. `stateful` are branches with a state, which come before the nodes.

    `origins` gives the place in the source where a node first arose. `general`: None where extents cannot be left open.
    """

    name: str
    parameters: Mapping[str, object]
    head_lists: tuple[tuple[str, int], ...]
    tensors: tuple[Tensor, ...]
    segments: tuple[Segment, ...]
    align: Literal["start", "end"] | None
    needs_align: bool
    documents: Tensor | None
    requirements: tuple[tuple[Index, Span], ...]
    nodes: tuple[Attend, ...]
    origins: Mapping[Index, Span]
    combine: Value | None = None
    lse: Value | None = None
    general: OpenExtents | None = None
    recur: Recur | None = None
    stateful: tuple[Recur, ...] = ()
    selections: tuple[Selection, ...] = ()

    @property
    def chooses(self) -> bool:
        """Whether what is seen differs from call to call by its content: selections, or tokens that are sorted."""
        return bool(self.selections) or any(tensor.made is not None for tensor in self.tensors)

    @property
    def attend(self) -> Attend:
        """The only node."""
        (node,) = self.nodes
        return node

    def __str__(self) -> str:
        from attnc.compiler.print_ir import print_pattern

        return print_pattern(self)
