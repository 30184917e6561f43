"""Exact expressions drawn by hypothesis, in three forms: language text, IR built by folding, plain Python value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnc.compiler.ir import Data, Index, Var, fold
from attnc.compiler.ir.rewrite import aggregate

Number = int | bool
Places = Mapping[str, int]
"""The values of `q`, `k` and of aggregate variables."""


class Fault(Exception):  # noqa: N818  marks a missing value, not an error
    """The expression has no value, or an intermediate value so large that the language may refuse it."""


HUGE = 1 << 60


@dataclass(frozen=True, eq=False)
class Tree:
    """An operation on operands; leaves are `q`, `k`, variables and numbers."""

    op: str
    operands: tuple[Tree, ...] = ()
    number: int = 0
    name: str = ""
    data: Data | None = None

    def __repr__(self) -> str:
        return text(self)


# --- as text ---------------------------------------------------------------------------------------------------------

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "pow": "**",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "and": "and", "or": "or",
}  # fmt: skip


def text(tree: Tree) -> str:
    """Return the expression in the language, with every operation in parentheses."""
    operands = [text(operand) for operand in tree.operands]
    match tree.op:
        case "number":
            return str(tree.number) if tree.number >= 0 else f"({tree.number})"
        case "name":
            return tree.name
        case "truth":
            return "true" if tree.number else "false"
        case "neg":
            return f"(-{operands[0]})"
        case "not":
            return f"(not {operands[0]})"
        case "choice":
            return f"({operands[1]} if {operands[0]} else {operands[2]})"
        case "read":
            assert tree.data is not None
            return f"{tree.data.name}[{', '.join(operands)}]"
        case "any" | "all" | "sum" | "least" | "most" | "count":
            low, high, condition, body = operands
            word = {"least": "min", "most": "max"}.get(tree.op, tree.op)
            return f"{word}({body} for {tree.name} in {low} .. {high} if {condition})"
        case op if op in _INFIX:
            return f"({f' {_INFIX[op]} '.join(operands)})"
        case op:
            return f"{op}({', '.join(operands)})"


# --- as a number -----------------------------------------------------------------------------------------------------


def value(tree: Tree, places: Places) -> Any:
    """Evaluate the expression in plain Python; raise Fault if it has no value."""
    match tree.op:
        case "number":
            return tree.number
        case "truth":
            return bool(tree.number)
        case "name":
            return places[tree.name]
        case "and":
            return all(value(operand, places) for operand in tree.operands)
        case "or":
            return any(value(operand, places) for operand in tree.operands)
        case "choice":
            condition, then, otherwise = tree.operands
            return value(then if value(condition, places) else otherwise, places)
        case "any" | "all" | "sum" | "least" | "most" | "count":
            return _aggregate(tree, places)
        case _:
            return _checked(_apply(tree, [value(operand, places) for operand in tree.operands]))


def _checked(number: Number) -> Number:
    if abs(number) > HUGE:
        raise Fault
    return number


def _aggregate(tree: Tree, places: Places) -> Number:
    low, high, condition, body = tree.operands
    inside = [{**places, tree.name: i} for i in range(value(low, places), value(high, places))]
    values = (value(body, p) for p in inside if value(condition, p))
    match tree.op:
        case "any":
            return any(values)
        case "all":
            return all(values)
        case "sum" | "count":
            return _checked(sum(values))
        case _:
            evaluated = list(values)
            if not evaluated:
                raise Fault
            return int(min(evaluated) if tree.op == "least" else max(evaluated))


def _apply(tree: Tree, operands: list[Any]) -> Number:  # noqa: C901  one case an operation
    match tree.op, operands:
        case "add", [a, b]:
            return int(a + b)
        case "sub", [a, b]:
            return int(a - b)
        case "mul", [a, b]:
            return int(a * b)
        case "neg", [a]:
            return int(-a)
        case (("floordiv" | "mod"), [a, b]):
            if b == 0:
                raise Fault
            return int(a // b if tree.op == "floordiv" else a % b)
        case "pow", [a, b]:
            if b < 0 or (abs(a) > 1 and b > 60):
                raise Fault
            return int(a**b)
        case "abs", [a]:
            return int(abs(a))
        case "min", _:
            return int(min(operands))
        case "max", _:
            return int(max(operands))
        case "not", [a]:
            return not a
        case "read", _:
            return _read(tree, operands)
        case _:
            return (
                _bits(tree.op, operands)
                if len(operands) == 1 or tree.op[:3] in ("bit", "xor")
                else _compare(tree, operands)
            )


def _read(tree: Tree, indices: list[int]) -> Number:
    assert tree.data is not None
    if not all(0 <= i < n for i, n in zip(indices, tree.data.array.shape, strict=True)):
        raise Fault
    item: Number = tree.data.array[tuple(indices)].item()
    return item


def _bits(op: str, operands: list[int]) -> Number:
    match op, operands:
        case "bitand", [a, b]:
            return a & b
        case "bitor", [a, b]:
            return a | b
        case "xor", [a, b]:
            return a ^ b
        case "power_of_two", [a]:
            return a > 0 and a & (a - 1) == 0
        case _, [a]:
            if a < 0:
                raise Fault
            return isqrt(a) if op == "isqrt" else a.bit_length()
        case _:
            raise AssertionError(op)


def _compare(tree: Tree, operands: list[int]) -> bool:
    a, b = operands
    return bool({"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "eq": a == b, "ne": a != b}[tree.op])


def mask(tree: Tree, n_q: int, n_k: int) -> list[list[bool | None]]:
    """Return the truth value at every (q, k), None where the expression has no value."""

    def at(q: int, k: int) -> bool | None:
        try:
            return bool(value(tree, {"q": q, "k": k}))
        except Fault:
            return None

    return [[at(q, k) for k in range(n_k)] for q in range(n_q)]


# --- as IR -----------------------------------------------------------------------------------------------------------


def build(tree: Tree, variables: Mapping[str, Var] | None = None) -> Index:
    """Return the folded node."""
    variables = variables or {}
    if tree.op in ("any", "all", "sum", "least", "most", "count"):
        return _build_aggregate(tree, variables)
    operands = [build(operand, variables) for operand in tree.operands]
    match tree.op:
        case "number":
            return fold.const(tree.number)
        case "truth":
            return fold.truth(bool(tree.number))
        case "name":
            return fold.place(tree.name) if tree.name in ("q", "k") else variables[tree.name]  # type: ignore[arg-type]
        case "read":
            assert tree.data is not None
            return fold.data_read(tree.data, tuple(operands))
        case "power_of_two":
            one_bit = fold.zero(fold.function("bitand", operands[0], fold.add(operands[0], fold.const(-1))))
            return fold.conjunction(fold.less(fold.const(0), operands[0]), one_bit)
        case _:
            node: Index = _CONSTRUCTORS[tree.op](*operands)
            return node


_CONSTRUCTORS: Mapping[str, Any] = {
    "add": fold.add,
    "sub": fold.sub,
    "mul": fold.mul,
    "neg": lambda a: fold.times(a, -1),
    "floordiv": fold.floordiv,
    "mod": fold.mod,
    "pow": fold.power,
    "abs": fold.absolute,
    "min": fold.minimum,
    "max": fold.maximum,
    "bitlen": lambda a: fold.function("bitlen", a),
    "isqrt": lambda a: fold.function("isqrt", a),
    "bitand": lambda a, b: fold.function("bitand", a, b),
    "bitor": lambda a, b: fold.function("bitor", a, b),
    "xor": lambda a, b: fold.function("xor", a, b),
    "lt": fold.less,
    "le": fold.less_equal,
    "gt": lambda a, b: fold.less(b, a),
    "ge": lambda a, b: fold.less_equal(b, a),
    "eq": fold.equal,
    "ne": lambda a, b: fold.negation(fold.equal(a, b)),
    "and": fold.conjunction,
    "or": fold.disjunction,
    "not": fold.negation,
    "choice": fold.choice,
}


def _build_aggregate(tree: Tree, variables: Mapping[str, Var]) -> Index:
    low, high, condition, body = tree.operands
    variable = fold.var(tree.name, len(variables))
    inner = {**variables, tree.name: variable}
    ends = build(low, variables), build(high, variables)
    what = build(body, inner)
    if tree.op == "count":
        what = fold.choice(what, fold.const(1), fold.const(0))
    op: Any = {"least": "min", "most": "max", "count": "sum"}.get(tree.op, tree.op)
    return aggregate(op, variable, *ends, build(condition, inner), what)


# --- drawing ---------------------------------------------------------------------------------------------------------


def number(n: int) -> Tree:
    """Return a leaf with a number."""
    return Tree("number", number=n)


def name(word: str) -> Tree:
    """Return a leaf with a position or variable."""
    return Tree("name", name=word)


Q, K = name("q"), name("k")
DELTA = Tree("sub", (Q, K))
YES = Tree("truth", number=1)

POSITIVE = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 16, 31])
SMALL = st.integers(-9, 40)


@dataclass(frozen=True)
class Kit:
    """The options of a draw: names in scope, data that may be read, aggregates, and operations that may fault."""

    names: tuple[str, ...] = ()
    data: tuple[Data, ...] = ()
    aggregates: bool = True
    faults: bool = True


@st.composite
def integers(draw: st.DrawFn, depth: int, kit: Kit) -> Tree:  # noqa: C901  one case a kind
    """Draw an integer expression."""
    if depth <= 0:
        return draw(_leaf(kit))
    kinds = ["leaf", "sum", "sum", "divided", "divided", "scaled", "extreme", "abs", "bits", "product", "choice"]
    kinds += ["aggregate"] * kit.aggregates + ["any divisor"] * kit.faults + ["read"] * (2 if _ints(kit) else 0)
    kind = draw(st.sampled_from(kinds))
    inner = integers(depth - 1, kit)
    match kind:
        case "leaf":
            return draw(_leaf(kit))
        case "sum":
            return Tree(draw(st.sampled_from(["add", "sub"])), (draw(inner), draw(inner)))
        case "divided":
            return Tree(draw(st.sampled_from(["floordiv", "mod"])), (draw(inner), number(draw(POSITIVE))))
        case "any divisor":
            return Tree(draw(st.sampled_from(["floordiv", "mod"])), (draw(inner), draw(inner)))
        case "scaled":
            return Tree("mul", (number(draw(SMALL)), draw(inner)))
        case "product":
            return Tree("mul", (draw(inner), draw(inner)))
        case "extreme":
            return Tree(draw(st.sampled_from(["min", "max"])), (draw(inner), draw(inner)))
        case "abs":
            return Tree(draw(st.sampled_from(["abs", "neg"])), (draw(inner),))
        case "choice":
            return Tree("choice", (draw(truths(depth - 1, kit)), draw(inner), draw(inner)))
        case "aggregate":
            return draw(_aggregates(depth, kit, ("sum", "count", "least", "most")))
        case "read":
            return draw(_reads(depth, kit, bool_=False))
        case _:
            return draw(_bit_functions(depth, kit))


def _ints(kit: Kit) -> bool:
    return any(d.array.dtype != np.bool_ for d in kit.data)


@st.composite
def _leaf(draw: st.DrawFn, kit: Kit) -> Tree:
    leaves = [Q, K, DELTA, *(name(word) for word in kit.names)]
    return draw(st.one_of(st.sampled_from(leaves), SMALL.map(number)))


@st.composite
def _bit_functions(draw: st.DrawFn, depth: int, kit: Kit) -> Tree:
    inner = integers(depth - 1, kit)
    op = draw(st.sampled_from(["bitlen", "isqrt", "bitand", "bitor", "xor", "pow"]))
    if op == "pow":
        small = Tree("mod", (draw(inner), number(draw(st.sampled_from([2, 3, 5])))))
        return Tree("pow", (draw(inner), draw(st.sampled_from([number(0), number(1), number(3), small]))))
    if op in ("bitlen", "isqrt"):
        operand = draw(inner)
        return Tree(op, (operand if kit.faults and draw(st.booleans()) else Tree("abs", (operand,)),))
    return Tree(op, (draw(inner), draw(inner)))


@st.composite
def _reads(draw: st.DrawFn, depth: int, kit: Kit, bool_: bool) -> Tree:
    data = draw(st.sampled_from([d for d in kit.data if (d.array.dtype == np.bool_) == bool_]))
    return Tree("read", tuple(_inside(draw(integers(depth - 2, kit)), n) for n in data.array.shape), data=data)


def _inside(index: Tree, size: int) -> Tree:
    """Restrict an index to `0 .. size`, in one of several forms."""
    if index.op == "name" and size >= LONG:
        return index
    return Tree("mod", (index, number(size)))


LONG = 64
"""Minimum number of entries of data that may be read at q or k directly."""


@st.composite
def _aggregates(draw: st.DrawFn, depth: int, kit: Kit, ops: tuple[str, ...]) -> Tree:
    op = draw(st.sampled_from(ops))
    word = f"i{len(kit.names)}"
    inner = Kit((*kit.names, word), kit.data, depth > 2, kit.faults)
    low = draw(st.one_of(st.integers(-3, 3).map(number), integers(depth - 2, kit)))
    high = (
        Tree("add", (low, number(draw(st.integers(0, 5))))) if draw(st.booleans()) else number(draw(st.integers(0, 6)))
    )
    if low.op != "number" and high.op == "number":
        low = number(draw(st.integers(-3, 3)))
    condition = YES if draw(st.booleans()) else draw(truths(depth - 2, inner))
    body = truths(depth - 1, inner) if op in ("any", "all", "count") else integers(depth - 1, inner)
    return Tree(op, (low, high, condition, draw(body)), name=word)


@st.composite
def truths(draw: st.DrawFn, depth: int, kit: Kit) -> Tree:
    """Draw a truth-valued expression."""
    kinds = ["compare"] * 3 + ["window"]
    if depth > 0:
        kinds += ["junction", "junction", "not", "choice", "power of two"]
        kinds += ["aggregate"] * kit.aggregates + ["read"] * any(d.array.dtype == np.bool_ for d in kit.data)
    inner = truths(depth - 1, kit)
    match draw(st.sampled_from(kinds)):
        case "window":
            return Tree("le", (DELTA, number(draw(st.integers(-3, 40)))))
        case "junction":
            return Tree(
                draw(st.sampled_from(["and", "or"])), tuple(draw(inner) for _ in range(draw(st.integers(2, 3))))
            )
        case "not":
            return Tree("not", (draw(inner),))
        case "choice":
            return Tree("choice", (draw(inner), draw(inner), draw(inner)))
        case "power of two":
            return Tree("power_of_two", (draw(integers(depth - 1, kit)),))
        case "aggregate":
            return draw(_aggregates(depth, kit, ("any", "all")))
        case "read":
            return draw(_reads(depth, kit, bool_=True))
        case _:
            op = draw(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]))
            return Tree(op, (draw(integers(depth, kit)), draw(integers(max(depth - 1, 0), kit))))


@st.composite
def arrays(draw: st.DrawFn, length: int) -> Data:
    """Draw data of tokens: runs of equal ids, noise, or truth values; or a small matrix."""
    random = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    kind = draw(st.sampled_from(["runs", "noise", "bool", "matrix", "scalar"]))
    array: NDArray[Any]
    match kind:
        case "runs":
            array = np.repeat(np.arange(length), random.integers(1, 12, length))[:length]
        case "noise":
            array = random.integers(-3, 4, length)
        case "bool":
            array = np.repeat(random.random(length) < 0.6, random.integers(1, 9, length))[:length]
        case "matrix":
            array = random.integers(0, 2, (3, 5)).astype(np.int64 if random.random() < 0.5 else np.bool_)
        case _:
            array = np.array(int(random.integers(0, 9)), dtype=np.int64)
    return Data(f"data_{kind}", array if array.dtype == np.bool_ else array.astype(np.int64))
