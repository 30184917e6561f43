"""The meaning of a recurrence: its lines, token by token, in binary64. Values carry the names of their axes."""

from __future__ import annotations

import cmath
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, cast

from attnc.spec import program
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning import float_arithmetic
from attnc.spec.meaning.denotation import EvaluationFrame, Result, constantly
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault
from attnc.spec.types import Dim

if TYPE_CHECKING:
    from attnc.spec.meaning.evaluate import Evaluator, SequenceView

States = dict[str, Any]
"""Nested tuples by the name of a state."""


@dataclass(frozen=True, slots=True)
class Array:
    """Numbers over named axes, nested in their order."""

    axes: tuple[Dim, ...]
    entries: tuple[Any, ...]


Found = Result | Array


class RecurrentRuns:
    """The runs of one call, over its q, k and v."""

    def __init__(self, call: Evaluator, recurrence: program.RecurrenceClauses, member: int | None = None) -> None:
        """`member`: which of a family."""
        self._bound: dict[program.Binder, Found] = {}
        if recurrence.family is not None and member is not None:
            self._bound[recurrence.family.binder] = member
        self._call = call
        self._recurrence = recurrence

    def run(self, batch: int, head: int, begun: States | None) -> tuple[list[tuple[float, ...]], States]:
        """(outputs by row, states after the last token) of a batch entry and head.

        `begun`: the states before the first token. Each document begins anew.
        """
        outs: dict[int, tuple[float, ...]] = {}
        states = self._start() if begun is None else self._given(begun)
        for number, view in enumerate(self._call.views(batch)):
            if number:
                states = self._start()
            for position in self._order(view, batch, head):
                out, states = self._token(view, position, batch, head, states)
                outs[view.first_row + position] = out
        final = {state.name: array.entries for state, array in states.items()}
        return [outs[row] for row in sorted(outs)], final

    def _start(self) -> dict[program.StateClause, Array]:
        return {state: Array(state.dims, self._filled(state.dims, state)) for state in self._recurrence.states}

    def _filled(self, dims: Sequence[Dim], state: program.StateClause) -> Any:
        if not dims:
            return complex(state.start) if state.is_complex else state.start
        size = dims[0] if isinstance(dims[0], int) else self._call.whole.size(str(dims[0]), state.span)
        return (self._filled(dims[1:], state),) * size

    def _given(self, states: States) -> dict[program.StateClause, Array]:
        return {state: Array(state.dims, _nested(states[state.name])) for state in self._recurrence.states}

    def _order(self, view: SequenceView, batch: int, head: int) -> list[int]:
        scan = self._recurrence.scan
        if scan is None:
            return list(range(view.keys))
        meaning = self._call.meanings.of(scan)
        places = [meaning(self._frame(view, t, head, batch)) for t in range(view.keys)]
        if len(set(places)) < len(places):
            message = "`scan` gives two tokens the same place"
            raise EvaluationError("A901", message, scan.span, "add what tells them apart")
        return sorted(range(view.keys), key=lambda t: cast("int", places[t]))

    def _frame(self, view: SequenceView, position: int, head: int, batch: int) -> EvaluationFrame:
        frame = view.frame(position, position, head, batch)
        for binder, member in self._bound.items():
            frame = frame.binding(binder, constantly(cast("int", member)))
        return frame

    def _token(
        self, view: SequenceView, position: int, batch: int, head: int, states: Mapping[program.StateClause, Array]
    ) -> tuple[tuple[float, ...], dict[program.StateClause, Array]]:
        frame = self._frame(view, position, head, batch)
        reset = self._recurrence.reset
        own = dict(states)
        if reset is not None and self._call.meanings.of(reset)(frame):
            own = self._start()
        line = _TokenLines(self._call, frame, own, dict(self._bound))
        out: tuple[float, ...] | None = None
        for item in self._recurrence.lines:
            self._call.steps = 0
            match item:
                case program.Let(binder=binder, value=value):
                    line.bound[binder] = line.of(value)
                case program.ReadClause(value=value):
                    out = cast("Array", line.of(value)).entries
                case program.StepClause(state=state, value=value, repeat=None):
                    line.states[state] = line.over(value, state)
                case program.StepClause(state=state, value=value, repeat=repeat):
                    assert repeat is not None
                    for j in line.range(repeat):
                        line.bound[repeat.binder] = j
                        line.states[state] = line.over(value, state)
        assert out is not None
        return tuple(map(float, out)), line.states


@dataclass
class _TokenLines:
    """The values of a token's lines."""

    call: Evaluator
    frame: EvaluationFrame
    states: dict[program.StateClause, Array]
    bound: dict[program.Binder, Found]

    def over(self, node: program.Expr, state: program.StateClause) -> Array:
        """A value over all of a state's axes."""
        return Array(state.dims, _spread(self.of(node), state.dims, self.states[state].entries))

    def range(self, running: program.KeyRange) -> range:
        """The places of a range."""
        return range(cast("int", self.of(running.low)), cast("int", self.of(running.high)))

    def of(self, node: program.Expr) -> Found:
        """The value of an expression."""
        match node:
            case program.StateRead(state=state):
                now = self.states[state]
                return now if now.axes else cast("Result", now.entries)
            case program.Local(binder=binder):
                return self.bound[binder]
            case program.Vector() | program.InputRead():
                return self._given(node)
            case program.DefinitionUse(definition=definition, arguments=arguments):
                given = {p: self.of(a) for p, a in zip(definition.parameters, arguments, strict=True)}
                return _TokenLines(self.call, self.frame, self.states, {**self.bound, **given}).of(definition.body)
            case program.ConditionalValue(condition=condition, then=then, otherwise=otherwise):
                return self.of(then if self.of(condition) else otherwise)
            case program.Operation():
                return self._operation(node)
            case program.Aggregate():
                return self._aggregate(node)
            case program.ListValue(items=items):
                return cast("Result", tuple(self.of(item) for item in items))
            case _:
                return self._item(node) if isinstance(node, program.Item) else self._leaf(node)

    def _leaf(self, node: program.Expr) -> Result:
        return self.call.meanings.of(node)(self.frame)

    def _given(self, node: program.Vector | program.InputRead) -> Found:
        if isinstance(node, program.Vector):
            return Array(("dv" if node.tensor == "v" else "dk",), cast("tuple[float, ...]", self._leaf(node)))
        indices = [cast("int", self.of(index)) for index in node.indices]
        result = self.frame.around.element(node, indices, self.frame.head, self.frame.batch)
        if not isinstance(result, tuple):
            return result
        implied = sum(dim in ("batch", "head", "kv_head") for dim in node.input.type.dims)
        return Array(node.input.type.dims[implied + len(indices) :], result)

    def _item(self, node: program.Item) -> Found:
        table, index = self.of(node.table), cast("int", self.of(node.index))
        entries = table.entries if isinstance(table, Array) else cast("tuple[Any, ...]", table)
        if not 0 <= index < len(entries):
            message = f"the index {index} is out of range for a list of {len(entries)}"
            help_ = "test the index first: `… if 0 <= i < n else …`"
            raise EvaluationError("A902", message, node.index.span, help_)
        if isinstance(table, Array) and len(table.axes) > 1:
            return Array(table.axes[1:], entries[index])
        return cast("Found", entries[index])

    # --- operations --------------------------------------------------------------------------------------------------

    def _operation(self, node: program.Operation) -> Found:
        if node.op in ("and", "or"):
            stop = node.op == "or"
            return next((stop for operand in node.operands if self.of(operand) is stop), not stop)
        values = [self.of(operand) for operand in node.operands]
        try:
            if node.op in _OF_ARRAYS:
                return _OF_ARRAYS[node.op](*values)
            if node.op == "solve":
                return self._solve(*cast("list[Array]", values))
            if node.op == "eye":
                return self._eye(node, cast("int", values[0]))
            if node.op == "part":
                number, of = cast("tuple[int, int]", tuple(values[1:]))
                return _part(cast("Array", values[0]), number, of)
            return _entrywise(lambda *x: _of_numbers(node.op, x, floating_=node.floating), values)
        except ArithmeticFault as fault:
            help_ = "test for that case first: `… if condition else …`"
            raise EvaluationError("A901", str(fault), node.span, help_) from None

    def _solve(self, matrix: Array, vector: Array) -> Array:
        given: list[Any] = [matrix.entries, vector.entries]
        if self.call.program.approximate is not None:
            given.append(self.of(self.call.program.approximate))
        return Array(vector.axes, float_arithmetic.apply("solve", given, floating=True))

    def _eye(self, node: program.Operation, size: int) -> Array:
        axis: Dim = node.operands[0].name if isinstance(node.operands[0], program.Size) else size
        return Array((axis, axis), float_arithmetic.apply("eye", (size,), floating=True))

    def _aggregate(self, node: program.Aggregate) -> Found:
        found = [line.of(node.body) for line in self._running(node, 0)]
        match node.op:
            case "any" | "all":
                return bool(found) and any(found) if node.op == "any" else all(found)
            case "count":
                return sum(1 for value in found if value)
        if not found:
            return cast("Result", float_arithmetic.total(node.op, ()))
        name = "add" if node.op in ("sum", "mean") else node.op
        whole = found[0]
        for value in found[1:]:
            whole = _entrywise(lambda *x: _of_numbers(name, x, floating_=node.floating), (whole, value))
        if node.op == "mean":
            count = len(found)
            whole = _entrywise(lambda x: _of_numbers("div", (x, count), floating_=True), (whole,))
        return whole

    def _running(self, node: program.Aggregate, depth: int) -> Iterator[_TokenLines]:
        if depth == len(node.runnings):
            if node.condition is None or self.of(node.condition):
                yield self
            return
        running = node.runnings[depth]
        assert isinstance(running, program.RangeVariable)
        assert isinstance(running.target, program.Binder)
        for i in range(cast("int", self.of(running.low)), cast("int", self.of(running.high))):
            self.frame.around.tick(node.span)
            yield from _TokenLines(self.call, self.frame, self.states, {**self.bound, running.target: i})._running(
                node, depth + 1
            )


# --- arrays ----------------------------------------------------------------------------------------------------------


def _nested(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_nested, value)) if isinstance(value, list | tuple) else _number(value)


def _number(value: Any) -> float | complex:
    return value if isinstance(value, complex) else float(value)


def _spread(value: Found, axes: Sequence[Dim], like: Any) -> Any:
    """The entries of a value over all of some axes, of which it has some, in their order; `like` shows their sizes."""
    if not axes:
        return value.entries if isinstance(value, Array) else value
    if isinstance(value, Array) and value.axes[0] == axes[0]:
        rest = value.axes[1:]
        parts = [Array(rest, entry) if rest else entry for entry in value.entries]
    else:
        parts = [value] * len(like)
    return tuple(_spread(part, axes[1:], inner) for part, inner in zip(parts, like, strict=True))


def _entrywise(function: Callable[..., Any], values: Sequence[Found]) -> Found:
    widest = max((x for x in values if isinstance(x, Array)), key=lambda x: len(x.axes), default=None)
    if widest is None:
        return cast("Result", function(*values))
    spread = [_spread(value, widest.axes, widest.entries) for value in values]
    return Array(widest.axes, _mapped(function, len(widest.axes), spread))


def _mapped(function: Callable[..., Any], depth: int, values: Sequence[Any]) -> Any:
    if not depth:
        return function(*values)
    return tuple(_mapped(function, depth - 1, entries) for entries in zip(*values, strict=True))


def _sizes(array: Array) -> list[int]:
    result, entries = [], array.entries
    for _ in array.axes:
        result.append(len(entries))
        entries = entries[0] if entries else ()
    return result


def _at(entries: Any, places: Sequence[int]) -> Any:
    for place in places:
        entries = entries[place]
    return _number(entries)


def _contracted(left: Array, right: Array, i: int, j: int) -> Found:
    """The sum over axis i of the one and axis j of the other; the other axes in order."""
    a, b = _sizes(left), _sizes(right)
    shared, rest = a[i], [*a[:i], *a[i + 1 :], *b[:j], *b[j + 1 :]]

    def entry(places: Sequence[int]) -> Any:
        mine, theirs = list(places[: len(a) - 1]), list(places[len(a) - 1 :])
        terms = (
            _at(left.entries, [*mine[:i], s, *mine[i:]]) * _at(right.entries, [*theirs[:j], s, *theirs[j:]])
            for s in range(shared)
        )
        return floating_sum(terms)

    axes = (*left.axes[:i], *left.axes[i + 1 :], *right.axes[:j], *right.axes[j + 1 :])
    return Array(axes, _tabled(entry, rest, ())) if axes else entry(())


def floating_sum(terms: Iterator[Any]) -> Any:
    """The sum, right to the last bit; of terms that are not all finite what IEEE 754 says."""
    found = list(terms)
    if any(isinstance(term, complex) for term in found):
        return complex(floating_sum(z.real for z in found), floating_sum(z.imag for z in found))
    return math.fsum(found) if all(map(math.isfinite, found)) else sum(found)


def _tabled(entry: Callable[[Sequence[int]], Any], sizes: Sequence[int], places: tuple[int, ...]) -> Any:
    if not sizes:
        return entry(places)
    return tuple(_tabled(entry, sizes[1:], (*places, i)) for i in range(sizes[0]))


def _matmul(left: Array, right: Array) -> Found:
    """Over the axis where they meet, or else the only one that both have."""
    if left.axes[-1] == right.axes[0]:
        return _contracted(left, right, len(left.axes) - 1, 0)
    shared = next(axis for axis in left.axes if axis in right.axes)
    return _contracted(left, right, left.axes.index(shared), right.axes.index(shared))


def _outer(left: Array, right: Array) -> Array:
    entries = tuple(tuple(_number(x) * _number(y) for y in right.entries) for x in left.entries)
    return Array(left.axes + right.axes, entries)


def _diagonal(vector: Array) -> Array:
    n = len(vector.entries)
    flat = iter(_number(vector.entries[i]) if i == j else 0.0 for i, j in product(range(n), range(n)))
    return Array(vector.axes * 2, tuple(tuple(next(flat) for _ in range(n)) for _ in range(n)))


def _softmax(vector: Array) -> Array:
    entries = [float(x) for x in vector.entries]
    whole = float_arithmetic.logsumexp(entries)
    return Array(vector.axes, tuple(math.exp(x - whole) for x in entries))


def _of_numbers(op: str, values: Sequence[Any], *, floating_: bool) -> Any:
    """An operation on numbers, some of which may be complex."""
    if not any(isinstance(x, complex) for x in values):
        return float_arithmetic.apply(op, values, floating=floating_)
    try:
        return _OF_COMPLEX[op](*(x if isinstance(x, complex) else float(x) for x in values))
    except OverflowError:
        return complex(math.nan, math.nan)


_OF_COMPLEX: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda a, b: a / b if b else complex(math.nan, math.nan),
    "neg": operator.neg,
    "exp": cmath.exp,
    "real": lambda z: z.real,
    "imag": lambda z: z.imag,
    "conj": lambda z: z.conjugate(),
}


def _part(vector: Array, number: int, of: int) -> Array:
    return Array(
        (f"{vector.axes[0]}/{of}",), float_arithmetic.apply("part", (vector.entries, number, of), floating=True)
    )


def _whole(op: str) -> Callable[[Array], Array]:
    return lambda vector: Array(vector.axes, float_arithmetic.apply(op, (vector.entries,), floating=True))


_OF_ARRAYS: dict[str, Callable[..., Found]] = {
    "matmul": _matmul,
    "outer": _outer,
    "diag": _diagonal,
    "softmax": _softmax,
    "dot": lambda a, b: _contracted(a, b, 0, 0),
    "normalised": _whole("normalised"),
    "rms": _whole("rms"),
}

__all__ = ["RecurrentRuns", "States"]
