"""A token's step as a list of operations on numbers, vectors and matrices.

For step equations of any kind: whoever goes from token to token runs the list from its beginning, and for gradients
from its end. What reads no state is a *leaf*: it is computed for all tokens beforehand, by whoever likes. Of what would
be a matrix for every token the parts are leaves, and the list makes the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

from attnc.compiler import fold, ir
from attnc.compiler.ir import Index, Recur, Value
from attnc.compiler.node_words import plural
from attnc.compiler.recurrences.call_constants import is_same_at_all
from attnc.compiler.rewrite import replace_values, substitute, substitute_value
from attnc.compiler.value_nodes import Axes, axes, number, rank, state_at

Kind = Literal[
    "leaf", "test", "state", "number", "apply", "sum", "extreme", "product", "root", "softmax", "diagonal", "pick"
]
MOST_TURNS = 64
"""Turns of a loop that are written out."""


class NoTapeError(Exception):
    """Why a recurrence is no such list, as words that follow "for"."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation; `operands` are numbers of earlier ones.

    leaf: the value `of` of the token; test: an integer, or a condition, of the token.
    state: the state named `of` before the token. number: `of` itself.
    apply: the function `of` entry by entry; `places` says for each operand at which axes of the result its own are.
    sum: over axis `of`. extreme: the largest or the least (`of`: max, min) along the first axis.
    product: of two matrices. root: 1 / sqrt of a number, 0 of 0. softmax: along the last axis.
    diagonal: the matrix of a vector, or of a number all along. pick: the entry (operand 1) of the first axis.
    """

    kind: Kind
    axes: Axes
    operands: tuple[int, ...] = ()
    of: object = None
    places: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class StepTape:
    """`ops` in order; `after`: the number of each state after the token; `read`: of what the token reads."""

    ops: tuple[Op, ...]
    after: tuple[tuple[str, int], ...]
    read: int

    @property
    def leaves(self) -> tuple[int, ...]:
        """The numbers of the values that are computed beforehand."""
        return tuple(i for i, op in enumerate(self.ops) if op.kind == "leaf")

    @property
    def tests(self) -> tuple[int, ...]:
        """The numbers of the integers and conditions that are."""
        return tuple(i for i, op in enumerate(self.ops) if op.kind == "test")

    def parts_along(self) -> str | int | None:
        """The last axis of what is read, where no entry of a state reads another's along it; None where one does.

        The entries of such an axis may be done apart: gradients of what has it not are sums over the parts.
        """
        own = self.ops[self.read].axes
        if not own or any(op.axes.count(own[-1]) > 1 for op in self.ops):
            return None
        return None if any(own[-1] in self._joined(op) for op in self.ops) else own[-1]

    def _joined(self, op: Op) -> Sequence[str | int]:
        """The axes along which entries of operands meet."""
        operands = [self.ops[i].axes for i in op.operands]
        match op.kind:
            case "sum":
                assert isinstance(op.of, int)
                return (operands[0][op.of],)
            case "product":
                return operands[0][1:]
            case "softmax":
                return operands[0][-1:]
            case "diagonal":
                return operands[0]
            case "pick" | "extreme":
                return operands[0][:1]
            case _:
                return ()

    def needed(self, wanted: Sequence[int]) -> frozenset[int]:
        """Operations that some of them need, themselves too."""
        found = set(wanted)
        for i in reversed(range(len(self.ops))):
            if i in found:
                found.update(self.ops[i].operands)
        return frozenset(found)

    def __str__(self) -> str:
        lines = [
            f"%{i}: [{', '.join(map(str, op.axes))}] = {op.kind}"
            + (f" {op.of}" if op.of is not None else "")
            + (f" of {', '.join(f'%{j}' for j in op.operands)}" if op.operands else "")
            for i, op in enumerate(self.ops)
        ]
        lines += [f"{name} <- %{i}" for name, i in self.after]
        return "\n".join([*lines, f"read %{self.read}"])


Ends = Callable[[Index], tuple[int, int]]
"""The least and the largest of an integer over all tokens of a call."""


def tape_of(recur: Recur, ends: Ends) -> StepTape:
    """The list of a recurrence; loops are written out, from the ends that they have in this call.

    Raises NoTapeError.
    """
    if any(state.is_complex for state in recur.states):
        raise NoTapeError("a state is complex")
    writing = _TapeWriter(ends)
    dims = {state.name: state.dims for state in recur.states}
    now = {name: writing.add(Op("state", own, of=name)) for name, own in dims.items()}
    versions = max((line.version for line in recur.steps), default=0) + 2
    for name, own in dims.items():
        writing.known[state_at(name, 0, own)] = now[name]
    for line in recur.steps:
        name, own = line.state, dims[line.state]
        before = state_at(name, line.version, own)
        for turn, value in enumerate(_turns(line, ends)):
            versions += 1
            inner = state_at(name, versions, own)
            writing.known[inner] = now[name]
            later = replace_values(value, {before: inner}) if turn else value
            now[name] = writing.spread(writing.of(later), own)
        writing.known[state_at(name, line.version + 1, own)] = now[name]
    read = writing.of(recur.read)
    return StepTape(tuple(writing.ops), tuple(now.items()), read)


def _turns(line: ir.Step, ends: Ends) -> list[Value]:
    if line.repeat is None:
        return [line.value]
    variable, low, high = line.repeat
    return [substitute_value(line.value, {variable: fold.const(j)}) for j in _span(low, high, ends)]


def _span(low: Index, high: Index, ends: Ends) -> range:
    (first, other), (least, last) = ends(low), ends(high)
    if first != other or least != last:
        raise NoTapeError("a loop has not as many turns for every token")
    if last - first > MOST_TURNS:
        raise NoTapeError(f"a loop has {last - first} turns, more than {MOST_TURNS}")
    return range(first, last)


@dataclass
class _TapeWriter:
    """A list that is being written. `known`: the numbers of values."""

    ends: Ends
    ops: list[Op] = field(default_factory=list)
    known: dict[Value, int] = field(default_factory=dict)
    tests: dict[Index, int] = field(default_factory=dict)

    def add(self, op: Op) -> int:
        """The number of an operation."""
        if len(op.axes) > 2:
            raise NoTapeError(f"a value has {len(op.axes)} axes, and values on the chip have two at most")
        self.ops.append(op)
        return len(self.ops) - 1

    def of(self, node: Value) -> int:
        """The number of a value."""
        if node not in self.known:
            leaf = _is_leaf(node) and not self._is_constant(node)
            self.known[node] = self.add(Op("leaf", axes(node), of=node)) if leaf else self._made(node)
        return self.known[node]

    def spread(self, i: int, wanted: Axes) -> int:
        """A value over axes, some of which it may not have."""
        own = self.ops[i].axes
        if own == wanted:
            return i
        zero = self.of(number(0.0))
        return self.add(Op("apply", wanted, (i, zero), "add", (_places(own, wanted), ())))

    def _made(self, node: Value) -> int:  # noqa: C901  one case a node kind
        match node:
            case ir.Number(value=value):
                return self.add(Op("number", (), of=value))
            case ir.Ratio(num=ir.Const(value=num), den=ir.Const(value=den)):
                return self.of(number(num / den))
            case ir.Ratio(num=ir.Extent(name=axis)):
                return self.add(Op("number", (), of=axis))
            case ir.Eye():
                return self.add(Op("diagonal", axes(node), (self.of(number(1.0)),)))
            case ir.Apply(op="normalised" | "rms" as op, operands=(x,)):
                return self._scaled(self.of(x), op == "rms")
            case ir.Apply(op="softmax", operands=(x,)):
                i = self.of(x)
                return self.add(Op("softmax", self.ops[i].axes, (i,)))
            case ir.Apply(op=op, operands=operands):
                return self._applied(op, [self.of(x) for x in operands])
            case ir.FloatSelect(condition=condition, then=then, otherwise=otherwise):
                sides = [self._test(condition), self.of(then), self.of(otherwise)]
                return self._applied("where", sides)
            case ir.Dot(left=left, right=right):
                return self._contracted(self.of(left), self.of(right), 0, 0)
            case ir.Contract(left=left, right=right, left_axis=i, right_axis=j):
                return self._contracted(self.of(left), self.of(right), i, j)
            case ir.Outer(left=left, right=right):
                a, b = self.of(left), self.of(right)
                m, n = len(self.ops[a].axes), len(self.ops[b].axes)
                places = tuple(range(m)), tuple(range(m, m + n))
                return self.add(Op("apply", self.ops[a].axes + self.ops[b].axes, (a, b), "mul", places))
            case ir.Diagonal(vector=vector):
                i = self.of(vector)
                return self.add(Op("diagonal", self.ops[i].axes * 2, (i,)))
            case ir.Pick(vector=vector, index=index):
                i = self.of(vector)
                return self.add(Op("pick", self.ops[i].axes[1:], (i, self._test(index))))
            case ir.ValueReduce():
                return self._total(node)
        raise NoTapeError(_WORDS.get(type(node), f"it has {plural(node)}"))

    def _test(self, node: Index) -> int:
        if node not in self.tests:
            self.tests[node] = self.add(Op("test", (), of=node))
        return self.tests[node]

    def _is_constant(self, node: Value) -> bool:
        """Whether it is known without the tokens, and no tensor need hold it."""
        match node:
            case ir.Number() | ir.Eye():
                return True
            case ir.Ratio(num=ir.Const(), den=ir.Const(value=den)):
                return den != 0
            case ir.Ratio(num=ir.Extent(name=axis), den=ir.Const(value=1)):
                return any(axis in op.axes for op in self.ops)
        return False

    def _applied(self, op: str, operands: list[int]) -> int:
        if op == "mul" and len(operands) == 2:
            for unit, other in (operands, operands[::-1]):
                if self._is_unit(unit) and not self.ops[other].axes:
                    return self.add(Op("diagonal", self.ops[unit].axes, (other,)))
        own = [self.ops[i].axes for i in operands]
        wanted = max(own, key=len)
        return self.add(Op("apply", wanted, tuple(operands), op, tuple(_places(each, wanted) for each in own)))

    def _is_unit(self, i: int) -> bool:
        """Whether it is the unit matrix."""
        op = self.ops[i]
        return op.kind == "diagonal" and self.ops[op.operands[0]].of == 1.0

    def _scaled(self, x: int, by_mean: bool) -> int:
        """x / ‖x‖ along the last axis, or x / √mean(x²); 0 of 0."""
        square = self._applied("mul", [x, x])
        last = len(self.ops[x].axes) - 1
        whole = self.add(Op("sum", self.ops[x].axes[:-1], (square,), last))
        if by_mean:
            width = self.add(Op("number", (), of=self.ops[x].axes[-1]))
            whole = self._applied("div", [whole, width])
        root = self.add(Op("root", self.ops[whole].axes, (whole,)))
        places = tuple(range(last + 1)), tuple(range(last))
        return self.add(Op("apply", self.ops[x].axes, (x, root), "mul", places))

    def _contracted(self, a: int, b: int, i: int, j: int) -> int:
        own, other = self.ops[a].axes, self.ops[b].axes
        if len(own) == len(other) == 2:
            left = a if i == 1 else self._turned(a)
            right = b if j == 0 else self._turned(b)
            return self.add(Op("product", (own[1 - i], other[1 - j]), (left, right)))
        whole = max(own, other, key=len)
        at = i if len(own) >= len(other) else j
        places = tuple(tuple(range(2))[: len(x)] if len(x) == len(whole) else (at,) for x in (own, other))
        product = self.add(Op("apply", whole, (a, b), "mul", places))
        return self.add(Op("sum", whole[:at] + whole[at + 1 :], (product,), at))

    def _turned(self, i: int) -> int:
        own = self.ops[i].axes
        return self.add(Op("apply", own[::-1], (i, self.of(number(1.0))), "mul", ((1, 0), ())))

    def _total(self, node: ir.ValueReduce) -> int:
        """A sum, or an extreme, of what a few turns of a variable give: all of them, where a condition holds."""
        entries = whole_axes(node)
        if entries is not None:
            return self._along(node.op, self.of(entries), rank(entries) - rank(node))
        empty = self.of(number({"sum": 0.0, "min": float("inf"), "max": -float("inf")}[node.op]))
        found = []
        for j in _span(node.low, node.high, self.ends):
            turn: dict[Index, Index] = {node.var: fold.const(j)}
            value = self.of(substitute_value(node.body, turn))
            condition = self._test(substitute(node.condition, turn))
            found.append(self._applied("where", [condition, value, empty]))
        if not found:
            return empty
        return reduce(lambda a, b: self._applied("add" if node.op == "sum" else node.op, [a, b]), found)

    def _along(self, op: str, i: int, count: int) -> int:
        """A sum, or an extreme, of the entries along so many of the first axes."""
        for _ in range(count):
            rest = self.ops[i].axes[1:]
            i = self.add(Op("sum", rest, (i,), 0) if op == "sum" else Op("extreme", rest, (i,), op))
        return i


def whole_axes(node: ir.ValueReduce) -> Value | None:
    """Return the operand of a sum or extreme over whole first axes, `f(S)` for entries `f(S[i])`; None for others.

    Its loops, one in another, are each of all places of an axis, and nothing else reads them.
    """
    loops = [node]
    while isinstance(loops[-1].body, ir.ValueReduce):
        loops.append(loops[-1].body)
    if any(loop.op != node.op or loop.condition != fold.truth(True) for loop in loops):
        return None
    found: dict[Value, Value] = {}
    if not _is_entrywise(loops[-1].body, loops, found):
        return None
    return replace_values(loops[-1].body, found)


def _is_entrywise(node: Value, loops: Sequence[ir.ValueReduce], found: dict[Value, Value]) -> bool:
    """Whether a value is a function of numbers and of entries at the places of loops; `found`: what has these."""
    whole = _entries(node, loops)
    if whole is not None:
        found[node] = whole
        return True
    match node:
        case ir.Number() | ir.Ratio(num=ir.Const(), den=ir.Const()):
            return True
        case ir.Apply(operands=operands) if node.op not in ("softmax", "normalised", "rms"):
            return all(_is_entrywise(each, loops, found) for each in operands)
        case _:
            return False


def _entries(node: Value, loops: Sequence[ir.ValueReduce]) -> Value | None:
    """Return the value whose entry at the loops' indices this is, or None."""
    for loop in reversed(loops):
        if not isinstance(node, ir.Pick) or node.index != loop.var:
            return None
        node = node.vector
    places = {loop.var for loop in loops}
    if any(below in places for below in node.below):
        return None
    ends = [(loop.low, loop.high) for loop in loops]
    wanted = [(fold.const(0), fold.const(a) if isinstance(a, int) else fold.extent(a)) for a in axes(node)]
    return node if ends == wanted[: len(loops)] else None


def _places(own: Axes, wanted: Axes) -> tuple[int, ...]:
    """At which of the wanted axes a value has its own, in their order."""
    found: list[int] = []
    for at, axis in enumerate(wanted):
        if len(found) < len(own) and own[len(found)] == axis:
            found.append(at)
    if len(found) < len(own):
        raise NoTapeError(f"[{', '.join(map(str, own))}] does not lie along [{', '.join(map(str, wanted))}]")
    return tuple(found)


def _is_leaf(node: Value) -> bool:
    """Whether it is computed beforehand: it reads no state, and is no matrix that every token would need its own of."""
    if any(isinstance(below, ir.StateAt) for below in node.below):
        return False
    return rank(node) <= 1 or isinstance(node, ir.Element) or is_same_at_all(node)


_WORDS: Mapping[type, str] = {
    ir.Solve: "a system of a state is solved",
    ir.VectorPart: "a part of a state is taken",
    ir.VisibleReduce: "it sums over keys",
}
