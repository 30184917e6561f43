"""Constructors of floating-point values, and questions about what values depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, reduce
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from typing_extensions import TypeIs

from attnc.compiler.ir import fold
from attnc.compiler.ir.nodes import (
    VALUES,
    Apply,
    Const,
    Contract,
    Diagonal,
    Dot,
    Element,
    Extent,
    Eye,
    FloatSelect,
    HeadIndex,
    Index,
    Lookup,
    Node,
    Number,
    Outer,
    Pick,
    Position,
    Ranking,
    Ratio,
    Scale,
    Softmax,
    Solve,
    StateAt,
    Tensor,
    Truth,
    Value,
    ValueReduce,
    Var,
    Vec,
    VectorPart,
    VisibleReduce,
    intern,
)

if TYPE_CHECKING:
    from attnc.compiler.ir.pattern import Attend, Pattern, Recur


def number(value: float) -> Value:
    """Return a floating-point constant."""
    return intern(Number(float(value)))


def ratio(num: Index, den: Index) -> Value:
    """Return the exact number `num / den` as a floating-point value."""
    return intern(Ratio(num, den))


def vector(name: Literal["q", "k", "v"], head: Index | None = None, at: Index | None = None) -> Value:
    """Return the vector of a query, key or value; by default of the current head at the current position."""
    place = fold.place("q" if name == "q" else "k")
    return intern(Vec(name, fold.head_index("head") if head is None else head, place if at is None else at))


def is_own(node: Vec) -> bool:
    """Whether a vector is that of the current head at the current position."""
    return node is _own(node.tensor)


@cache
def _own(name: Literal["q", "k", "v"]) -> Value:
    return vector(name)


def scale() -> Value:
    """Return the call's scale."""
    return intern(Scale())


def element(tensor: Tensor, indices: tuple[Index, ...]) -> Value:
    """Return an element or a vector of a real input."""
    return intern(Element(tensor, indices))


def apply(op: str, *operands: Value) -> Value:
    """Apply the function named `op` to operands."""
    return intern(Apply(op, operands))


def dot(left: Value, right: Value) -> Value:
    """Return the inner product of two vectors."""
    return intern(Dot(left, right))


def select(condition: Index, then: Value, otherwise: Value) -> Value:
    """Return `then` where the condition holds, else `otherwise`."""
    if isinstance(condition, Truth):
        return then if condition.value else otherwise
    return then if then is otherwise else intern(FloatSelect(condition, then, otherwise))


def pick(vector: Value, index: Index) -> Value:
    """Return an entry of a vector, or a row of a matrix."""
    return intern(Pick(vector, index))


def part(vector: Value, number: int, of: int) -> Value:
    """Return part `number` of `of` equal parts of a vector."""
    return intern(VectorPart(vector, number, of))


def outer(left: Value, right: Value) -> Value:
    """Return the outer product of two vectors."""
    return intern(Outer(left, right))


def eye(size: Index) -> Value:
    """Return the identity matrix of a size."""
    return intern(Eye(size))


def solve(matrix: Value, vector: Value, steps: int | None = None) -> Value:
    """Return the solution of a linear system; by conjugate gradients where `steps` is given."""
    return intern(Solve(matrix, vector, steps))


def seen(op: Literal["sum", "min", "max"], condition: Index, body: Value) -> Value:
    """Return an aggregate over the visible keys of a row."""
    return intern(VisibleReduce(op, condition, body))


def extra_of(node: Attend) -> Value | None:
    """Return the extra logit of an attention's softmax; None where it has none."""
    return node.weights.extra if isinstance(node.weights, Softmax) else None


def values_of(node: Attend) -> list[Value]:
    """Return the values that an attention computes: its score, weights or extra logits, and value."""
    weights = node.weights.extra if isinstance(node.weights, Softmax) else node.weights
    return [value for value in (node.score, weights, node.value) if value is not None]


def output(node: Attend) -> Tensor:
    """Return the output of an attention as a tensor."""
    family = () if node.family is None else (f"{node.name}.members",)
    width = (f"{node.name}.width",) if rank(node.value) or node.stack is not None else ()
    return intern(Tensor(node.name, "real", ("batch", "head", "query", *family, *width)))


def output_of_state(recur: Recur) -> Tensor:
    """Return the output of a stateful branch, or of a family of them, as a tensor."""
    family = () if recur.member is None else (f"{recur.name}.members",)
    return intern(Tensor(recur.name, "real", ("batch", "head", "query", *family, f"{recur.name}.width")))


def output_lse(node: Attend) -> Tensor:
    """Return the log-sum-exp of an attention as a tensor."""
    family = () if node.family is None else (f"{node.name}.members",)
    return intern(Tensor(f"{node.name}.lse", "real", ("batch", "head", "query", *family)))


def ranking(name: Literal["rank", "mass", "score"]) -> Value:
    """Return the rank, mass or score of a candidate."""
    return intern(Ranking(name))


def contract(left: Value, right: Value) -> Value:
    """Contract two values over a shared axis: left's last with right's first if equal, else the first shared axis."""
    a, b = axes(left), axes(right)
    if a[-1] == b[0]:
        return intern(Contract(left, right, len(a) - 1, 0))
    shared = next(axis for axis in a if axis in b)
    return intern(Contract(left, right, a.index(shared), b.index(shared)))


def diagonal(vector: Value) -> Value:
    """Return the matrix with a vector on its diagonal."""
    return intern(Diagonal(vector))


def state_at(name: str, version: int, dims: tuple[str | int, ...]) -> Value:
    """Return a state after `version` of its steps."""
    return intern(StateAt(name, version, dims))


Axes = tuple[str | int, ...]


def axes(node: Value) -> Axes:  # noqa: C901  one case a node kind
    """Return the axes of a value, each by its name or its number of entries."""
    match node:
        case Vec(tensor=tensor):
            return ("dv" if tensor == "v" else "dk",)
        case Element(tensor=tensor, indices=indices):
            return tensor.dims[len(indices) :]
        case StateAt(dims=dims):
            return dims
        case Apply(operands=operands):
            return max((axes(operand) for operand in operands), key=len)
        case Pick(vector=inner):
            return axes(inner)[1:]
        case VectorPart(vector=inner, of=of):
            return (f"{axes(inner)[0]}/{of}",)
        case Outer(left=left, right=right):
            return axes(left) + axes(right)
        case Contract(left=left, right=right, left_axis=i, right_axis=j):
            a, b = axes(left), axes(right)
            return a[:i] + a[i + 1 :] + b[:j] + b[j + 1 :]
        case Diagonal(vector=inner):
            return axes(inner) * 2
        case Eye(size=size):
            size_name: str | int = (
                size.name if isinstance(size, Extent) else size.value if isinstance(size, Const) else ""
            )
            return (size_name, size_name)
        case Solve(vector=inner):
            return axes(inner)
        case FloatSelect(then=then, otherwise=otherwise):
            return max(axes(then), axes(otherwise), key=len)
        case ValueReduce(body=body) | VisibleReduce(body=body):
            return axes(body)
        case _:
            return ()


def rank(node: Value) -> int:
    """Return the number of axes of a value: 0 for a number, 1 for a vector, 2 for a matrix."""
    return len(axes(node))


def total(op: Literal["sum", "min", "max"], var: Var, low: Index, high: Index, condition: Index, body: Value) -> Value:
    """Return an aggregate over a range."""
    return intern(ValueReduce(op, var, low, high, condition, body))


def default_score() -> Value:
    """Return `scale * dot(q, k)`."""
    return apply("mul", scale(), dot(vector("q"), vector("k")))


def is_default(score: Value) -> bool:
    """Whether a score is `scale * dot(q, k)`, with factors in any order."""
    return (
        isinstance(score, Apply)
        and score.op == "mul"
        and len(score.operands) == 2
        and scale() in score.operands
        and bool(set(_products()) & set(score.operands))
    )


def is_plain(node: Attend) -> bool:
    """Whether an attention is the softmax of `scale * dot(q, k)` over tokens, applied to v."""
    return is_scored(node) and is_default(node.score) and node.weights == Softmax()


def is_scored(node: Attend) -> bool:
    """Whether an attention is a softmax over tokens, applied to v, whose scores depend on their query and key alone."""
    softmax = isinstance(node.weights, Softmax)
    is_usual = softmax and node.value is vector("v") and (node.keys, node.stack, node.family) == (None, None, None)
    parts = [node.score, *([node.weights.extra] if isinstance(node.weights, Softmax) and node.weights.extra else [])]
    return is_usual and all(
        not isinstance(below, VisibleReduce) and (not isinstance(below, Vec) or (is_own(below) and below.tensor != "v"))
        for part in parts
        for below in part.below
    )


def passes(node: Attend) -> int:
    """Return the number of passes over a row's keys: one, and another for every sum that a later sum needs complete."""
    if isinstance(node.weights, Softmax):
        return max(_passes(node.score), _passes(node.value))
    return max(_passes(node.weights), _passes(node.value))


def _passes(node: Value) -> int:
    """Return the number of passes over the keys; sums that multiply or divide the whole value share a pass."""
    sums = [n for n in _factors(node) if isinstance(n, VisibleReduce)]
    factors = [n for n in _factors(node) if not isinstance(n, VisibleReduce)]
    inside = [n for factor in factors for n in _seen(factor)]
    return max([_passes(n.body) for n in sums] + [1 + _passes(n.body) for n in inside], default=1)


def _factors(node: Value) -> list[Value]:
    """Return the factors of a product or quotient, or of a sum of products and quotients."""
    match node:
        case Apply(op="mul" | "div" | "share" | "add" | "sub" | "neg", operands=operands):
            return [factor for operand in operands for factor in _factors(operand)]
        case FloatSelect(then=then, otherwise=otherwise):
            return _factors(then) + _factors(otherwise)
        case _:
            return [node]


def _seen(node: Value) -> list[VisibleReduce]:
    """Return the outermost aggregates over keys whose bodies read vectors or inputs."""
    if isinstance(node, VisibleReduce):
        return [node] if any(isinstance(below, Vec | Element) for below in node.body.below) else []
    return [aggregate for child in node.children() if isinstance(child, VALUES) for aggregate in _seen(child)]


@dataclass(frozen=True, slots=True)
class Additive:
    """A score `factor * dot(q, k) + bias`: `factor` is a number, `bias` (None: 0) reads no vector of q or k."""

    factor: Value
    bias: Value | None


def additive(score: Value) -> Additive | None:
    """Split a score into a multiple of `dot(q, k)` and a bias; None where it has another form."""
    factors, biases = _summands(score, number(1.0))
    if factors is None or not factors:
        return None
    return Additive(summed(factors), summed(biases) if biases else None)


def summed(parts: list[Value]) -> Value:
    """Return the sum of one or more values."""
    return reduce(lambda a, b: apply("add", a, b), parts)


def _summands(node: Value, factor: Value) -> tuple[list[Value] | None, list[Value]]:
    """The factors of `dot(q, k)` in `factor * node`, None where they are unknown, and the other summands."""
    match node:
        case Dot() if node in _products():
            return [factor], []
        case Apply(op="add" | "sub" as op, operands=(a, b)):
            left_factors, left_rest = _summands(a, factor)
            right_factors, right_rest = _summands(b, factor if op == "add" else apply("neg", factor))
            return (
                None if left_factors is None or right_factors is None else left_factors + right_factors,
                left_rest + right_rest,
            )
        case Apply(op="neg", operands=(a,)):
            return _summands(a, apply("neg", factor))
        case Apply(op="mul", operands=(a, b)):
            for factor_node, rest_node in ((a, b), (b, a)):
                if not reads(factor_node) and not _has_inputs(factor_node):
                    return _summands(rest_node, apply("mul", factor, factor_node))
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
    """Whether a lowered expression is a floating-point value."""
    return isinstance(node, VALUES)


def reads(node: Value | Index) -> frozenset[str]:
    """Return what a node depends on: `q`, `k` (a position or its vector), `head`, `batch`; variables are ignored.

    An aggregate over the visible keys of a row depends on the row, but not on a key.
    """
    known = _READS.get(node)
    if known is None:
        known = _READS[node] = _reads(node)
    return known


_READS: WeakKeyDictionary[Node, frozenset[str]] = WeakKeyDictionary()


def _reads(node: Value | Index) -> frozenset[str]:
    if not any(isinstance(below, VisibleReduce) for below in node.below):
        return frozenset[str]().union(*map(_direct_reads, node.below))
    dependences: dict[Node, set[str]] = {}
    for below in node.below:
        dependences[below] = _direct_reads(below).union(*(dependences[child] for child in below.children()))
        if isinstance(below, VisibleReduce):
            dependences[below] = dependences[below] - {"k"} | {"q", "head"}
    return frozenset(dependences[node])


def _direct_reads(node: Node) -> set[str]:
    match node:
        case Position(name=name):
            return {name}
        case Vec():
            return {"batch"}
        case HeadIndex(name=name):
            return {"batch" if name == "batch" else "head"}
        case Element(tensor=tensor) | Lookup(tensor=tensor):
            return {"batch"} & set(tensor.dims)
        case _:
            return set()


def reads_kv_heads(*roots: Value | Index) -> bool:
    """Whether expressions depend on the kv head of a query head, or on the number of kv heads."""
    return any(
        (isinstance(below, HeadIndex) and below.name == "kv_head")
        or (isinstance(below, Extent) and below.name in ("kv_heads", "group"))
        for root in roots
        for below in root.below
    )


def tensors_of(pattern: Pattern) -> tuple[Tensor, ...]:
    """Return the inputs of a pattern that hold floating-point numbers."""
    return tuple(tensor for tensor in pattern.tensors if tensor.is_floating)
