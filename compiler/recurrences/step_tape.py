"""A token's step as a tape: a list of operations on numbers, vectors and matrices, for any step equation.

A token-by-token kernel runs the list forward, and backward for gradients. A value that reads no state is a *leaf*,
computed for all tokens before the kernel runs. If such a value would be a matrix for every token, its operands are
leaves instead, and the list computes the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

from attnc.compiler import ir
from attnc.compiler.ir import Index, Recur, Value, fold
from attnc.compiler.ir.node_words import plural
from attnc.compiler.ir.rewrite import replace_values, substitute, substitute_value
from attnc.compiler.ir.value_nodes import (
    Axes,
    axes,
    number,
    rank,
    state_at,
)
from attnc.compiler.recurrences.call_constants import is_same_at_all

Kind = Literal[
    "leaf", "test", "state", "number", "apply", "sum", "extreme", "product", "root", "softmax", "diagonal", "pick"
]
MOST_TURNS = 64
"""Maximum number of iterations of a loop, which is unrolled."""


class NoTapeError(Exception):
    """Raised for a recurrence that cannot run as a tape. The message is a clause that says why."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of a tape; `operands` are the indices of earlier operations. By `kind`:

    leaf: the token's value `of`, which reads no state; test: the token's integer or condition `of`.
    state: the state named `of` before the token. number: the constant `of`, or the size of the axis `of`.
    apply: the elementwise function `of`; `places` maps each operand's axes to axes of the result.
    sum: over axis `of`. extreme: the maximum or minimum (`of`: max, min) along the first axis.
    product: of two matrices. root: 1 / sqrt(x), 0 for x = 0. softmax: along the last axis.
    diagonal: the diagonal matrix of a vector or number. pick: the entry at index operand 1 along the first axis.
    """

    kind: Kind
    axes: Axes
    operands: tuple[int, ...] = ()
    of: object = None
    places: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class StepTape:
    """The operations `ops` in order; `after`: index of each state after the token; `read`: index of the read."""

    ops: tuple[Op, ...]
    after: tuple[tuple[str, int], ...]
    read: int

    @property
    def leaves(self) -> tuple[int, ...]:
        """The indices of the values that are computed before the kernel runs."""
        return tuple(i for i, op in enumerate(self.ops) if op.kind == "leaf")

    @property
    def tests(self) -> tuple[int, ...]:
        """The indices of the integers and conditions that are computed before the kernel runs."""
        return tuple(i for i, op in enumerate(self.ops) if op.kind == "test")

    def parts_along(self) -> str | int | None:
        """Return the last axis of the read value if entries along it never meet; None if they do.

        Programs may then compute blocks of this axis independently. Gradients of values without the axis are summed
        over the programs.
        """
        read_axes = self.ops[self.read].axes
        if not read_axes or any(op.axes.count(read_axes[-1]) > 1 for op in self.ops):
            return None
        return None if any(read_axes[-1] in self._mixed_axes(op) for op in self.ops) else read_axes[-1]

    def _mixed_axes(self, op: Op) -> Sequence[str | int]:
        """Return the axes along which an operation combines different entries."""
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
        """Return the indices of the operations that `wanted` depend on, including `wanted`."""
        needed_ops = set(wanted)
        for i in reversed(range(len(self.ops))):
            if i in needed_ops:
                needed_ops.update(self.ops[i].operands)
        return frozenset(needed_ops)

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
"""A function that returns the minimum and maximum of an integer over all tokens of a call."""


def tape_of(recur: Recur, ends: Ends) -> StepTape:
    """Return the tape of a recurrence; loops are unrolled with their ends in this call.

    Raises NoTapeError.
    """
    if any(state.is_complex for state in recur.states):
        raise NoTapeError("a state is complex")
    writer = _TapeWriter(ends)
    dims = {state.name: state.dims for state in recur.states}
    current = {name: writer.add(Op("state", state_axes, of=name)) for name, state_axes in dims.items()}
    versions = max((line.version for line in recur.steps), default=0) + 2
    for name, state_axes in dims.items():
        writer.op_by_value[state_at(name, 0, state_axes)] = current[name]
    for line in recur.steps:
        name, state_axes = line.state, dims[line.state]
        before = state_at(name, line.version, state_axes)
        for iteration, value in enumerate(_iterations(line, ends)):
            versions += 1
            inner_state = state_at(name, versions, state_axes)
            writer.op_by_value[inner_state] = current[name]
            iterated = replace_values(value, {before: inner_state}) if iteration else value
            current[name] = writer.spread(writer.of(iterated), state_axes)
        writer.op_by_value[state_at(name, line.version + 1, state_axes)] = current[name]
    read = writer.of(recur.read)
    return StepTape(tuple(writer.ops), tuple(current.items()), read)


def _iterations(line: ir.Step, ends: Ends) -> list[Value]:
    """Return the values of the iterations of a repeated line; one value for other lines."""
    if line.repeat is None:
        return [line.value]
    variable, low, high = line.repeat
    return [substitute_value(line.value, {variable: fold.const(j)}) for j in _loop_range(low, high, ends)]


def _loop_range(low: Index, high: Index, ends: Ends) -> range:
    """Return the range of a loop. Raises NoTapeError if it is too long or differs between tokens."""
    (first, other), (least, last) = ends(low), ends(high)
    if first != other or least != last:
        raise NoTapeError("a loop has different numbers of iterations for different tokens")
    if last - first > MOST_TURNS:
        raise NoTapeError(f"a loop has {last - first} iterations, more than {MOST_TURNS}")
    return range(first, last)


@dataclass
class _TapeWriter:
    """Writes a tape. `op_by_value`: the index of each value's operation; `tests`: of each integer's and condition's."""

    ends: Ends
    ops: list[Op] = field(default_factory=list)
    op_by_value: dict[Value, int] = field(default_factory=dict)
    tests: dict[Index, int] = field(default_factory=dict)

    def add(self, op: Op) -> int:
        """Append an operation; return its index."""
        if len(op.axes) > 2:
            raise NoTapeError(f"a value has {len(op.axes)} axes, and kernels support at most two")
        self.ops.append(op)
        return len(self.ops) - 1

    def of(self, node: Value) -> int:
        """Return the index of a value's operation, appended if it is new."""
        if node not in self.op_by_value:
            leaf = _is_leaf(node) and not self._is_constant(node)
            self.op_by_value[node] = self.add(Op("leaf", axes(node), of=node)) if leaf else self._compute(node)
        return self.op_by_value[node]

    def spread(self, i: int, wanted: Axes) -> int:
        """Return the index of operation `i` broadcast to the axes `wanted`."""
        value_axes = self.ops[i].axes
        if value_axes == wanted:
            return i
        zero = self.of(number(0.0))
        return self.add(Op("apply", wanted, (i, zero), "add", (_places(value_axes, wanted), ())))

    def _compute(self, node: Value) -> int:  # noqa: C901  one case a node kind
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
                return self._reduce(node)
        raise NoTapeError(_WORDS.get(type(node), f"it has {plural(node)}"))

    def _test(self, node: Index) -> int:
        if node not in self.tests:
            self.tests[node] = self.add(Op("test", (), of=node))
        return self.tests[node]

    def _is_constant(self, node: Value) -> bool:
        """Check whether a value is a constant, or the size of an axis, and needs no tensor."""
        match node:
            case ir.Number() | ir.Eye():
                return True
            case ir.Ratio(num=ir.Const(), den=ir.Const(value=den)):
                return den != 0
            case ir.Ratio(num=ir.Extent(name=axis), den=ir.Const(value=1)):
                return any(axis in op.axes for op in self.ops)
        return False

    def _applied(self, op: str, operands: list[int]) -> int:
        """Append an elementwise function; return its index."""
        if op == "mul" and len(operands) == 2:
            for unit, other in (operands, operands[::-1]):
                if self._is_unit(unit) and not self.ops[other].axes:
                    return self.add(Op("diagonal", self.ops[unit].axes, (other,)))
        operand_axes = [self.ops[i].axes for i in operands]
        result_axes = max(operand_axes, key=len)
        places = tuple(_places(own_axes, result_axes) for own_axes in operand_axes)
        return self.add(Op("apply", result_axes, tuple(operands), op, places))

    def _is_unit(self, i: int) -> bool:
        """Check whether operation `i` is the identity matrix."""
        op = self.ops[i]
        return op.kind == "diagonal" and self.ops[op.operands[0]].of == 1.0

    def _scaled(self, x: int, by_mean: bool) -> int:
        """Append x / ‖x‖ along the last axis, or x / √mean(x²) if `by_mean`; 0 for x = 0."""
        square = self._applied("mul", [x, x])
        last = len(self.ops[x].axes) - 1
        total = self.add(Op("sum", self.ops[x].axes[:-1], (square,), last))
        if by_mean:
            width = self.add(Op("number", (), of=self.ops[x].axes[-1]))
            total = self._applied("div", [total, width])
        root = self.add(Op("root", self.ops[total].axes, (total,)))
        places = tuple(range(last + 1)), tuple(range(last))
        return self.add(Op("apply", self.ops[x].axes, (x, root), "mul", places))

    def _contracted(self, a: int, b: int, i: int, j: int) -> int:
        """Append the contraction of axis i of operation a with axis j of operation b."""
        a_axes, b_axes = self.ops[a].axes, self.ops[b].axes
        if len(a_axes) == len(b_axes) == 2:
            left = a if i == 1 else self._transposed(a)
            right = b if j == 0 else self._transposed(b)
            return self.add(Op("product", (a_axes[1 - i], b_axes[1 - j]), (left, right)))
        longer = max(a_axes, b_axes, key=len)
        axis = i if len(a_axes) >= len(b_axes) else j
        places = tuple(tuple(range(2))[: len(x)] if len(x) == len(longer) else (axis,) for x in (a_axes, b_axes))
        product = self.add(Op("apply", longer, (a, b), "mul", places))
        return self.add(Op("sum", longer[:axis] + longer[axis + 1 :], (product,), axis))

    def _transposed(self, i: int) -> int:
        matrix_axes = self.ops[i].axes
        return self.add(Op("apply", matrix_axes[::-1], (i, self.of(number(1.0))), "mul", ((1, 0), ())))

    def _reduce(self, node: ir.ValueReduce) -> int:
        """Append a sum, minimum or maximum over whole axes, or over an unrolled loop with its condition."""
        entries = whole_axes(node)
        if entries is not None:
            return self._reduce_axes(node.op, self.of(entries), rank(entries) - rank(node))
        empty = self.of(number({"sum": 0.0, "min": float("inf"), "max": -float("inf")}[node.op]))
        terms = []
        for j in _loop_range(node.low, node.high, self.ends):
            iteration: dict[Index, Index] = {node.var: fold.const(j)}
            value = self.of(substitute_value(node.body, iteration))
            condition = self._test(substitute(node.condition, iteration))
            terms.append(self._applied("where", [condition, value, empty]))
        if not terms:
            return empty
        return reduce(lambda a, b: self._applied("add" if node.op == "sum" else node.op, [a, b]), terms)

    def _reduce_axes(self, op: str, i: int, count: int) -> int:
        """Append a sum, minimum or maximum along each of the first `count` axes."""
        for _ in range(count):
            remaining = self.ops[i].axes[1:]
            i = self.add(Op("sum", remaining, (i,), 0) if op == "sum" else Op("extreme", remaining, (i,), op))
        return i


def whole_axes(node: ir.ValueReduce) -> Value | None:
    """Return the operand of a reduction over whole first axes, `f(S)` for entries `f(S[i])`; None for others.

    Each of the nested loops must run over all indices of an axis, and its variable may only index that axis.
    """
    loops = [node]
    while isinstance(loops[-1].body, ir.ValueReduce):
        loops.append(loops[-1].body)
    if any(loop.op != node.op or loop.condition != fold.truth(True) for loop in loops):
        return None
    entries: dict[Value, Value] = {}
    if not _is_entrywise(loops[-1].body, loops, entries):
        return None
    return replace_values(loops[-1].body, entries)


def _is_entrywise(node: Value, loops: Sequence[ir.ValueReduce], entries: dict[Value, Value]) -> bool:
    """Check that a value is elementwise in entries at the loops' indices; map them to whole values in `entries`."""
    indexed = _entries(node, loops)
    if indexed is not None:
        entries[node] = indexed
        return True
    match node:
        case ir.Number() | ir.Ratio(num=ir.Const(), den=ir.Const()):
            return True
        case ir.Apply(operands=operands) if node.op not in ("softmax", "normalised", "rms"):
            return all(_is_entrywise(operand, loops, entries) for operand in operands)
        case _:
            return False


def _entries(node: Value, loops: Sequence[ir.ValueReduce]) -> Value | None:
    """Return the value whose entry at the loops' indices this is, or None."""
    for loop in reversed(loops):
        if not isinstance(node, ir.Pick) or node.index != loop.var:
            return None
        node = node.vector
    variables = {loop.var for loop in loops}
    if any(child in variables for child in node.below):
        return None
    ends = [(loop.low, loop.high) for loop in loops]
    full_ranges = [(fold.const(0), fold.const(a) if isinstance(a, int) else fold.extent(a)) for a in axes(node)]
    return node if ends == full_ranges[: len(loops)] else None


def _places(operand_axes: Axes, result_axes: Axes) -> tuple[int, ...]:
    """Return the indices of an operand's axes within the result's, of which they must be a subsequence."""
    places: list[int] = []
    for i, axis in enumerate(result_axes):
        if len(places) < len(operand_axes) and operand_axes[len(places)] == axis:
            places.append(i)
    if len(places) < len(operand_axes):
        raise NoTapeError(
            f"axes [{', '.join(map(str, operand_axes))}] do not broadcast to [{', '.join(map(str, result_axes))}]"
        )
    return tuple(places)


def _is_leaf(node: Value) -> bool:
    """Check whether a value is computed beforehand: it reads no state, and is not a computed matrix for each token."""
    if any(isinstance(child, ir.StateAt) for child in node.below):
        return False
    return rank(node) <= 1 or isinstance(node, ir.Element) or is_same_at_all(node)


_WORDS: Mapping[type, str] = {
    ir.Solve: "it solves a system with a state",
    ir.VectorPart: "it takes a part of a state",
    ir.VisibleReduce: "it sums over keys",
}
