"""Evaluate a recurrence token by token in binary64, on values with named axes."""

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
"""The entries of states as nested tuples, by the name of the state."""


@dataclass(frozen=True, slots=True)
class Array:
    """Numbers over named axes, as nested tuples in the order of the axes."""

    axes: tuple[Dim, ...]
    entries: tuple[Any, ...]


AxisValue = Result | Array


class RecurrentRuns:
    """Runs a recurrence over the tokens of one call."""

    def __init__(self, call: Evaluator, recurrence: program.RecurrenceClauses, member: int | None = None) -> None:
        """`member`: the index of the recurrence in its family."""
        self._bound: dict[program.Binder, AxisValue] = {}
        if recurrence.family is not None and member is not None:
            self._bound[recurrence.family.binder] = member
        self._call = call
        self._recurrence = recurrence

    def run(self, batch: int, head: int, begun: States | None) -> tuple[list[tuple[float, ...]], States]:
        """Return (outputs by row, final states) of a batch entry and head.

        `begun`: the states before the first token, None for the start values. Each further document starts anew.
        """
        outputs: dict[int, tuple[float, ...]] = {}
        states = self._start()
        if begun is not None:
            states = {state: Array(state.dims, _nested(begun[state.name])) for state in self._recurrence.states}
        for number, view in enumerate(self._call.views(batch)):
            if number:
                states = self._start()
            for position in self._order(view, batch, head):
                output, states = self._token(view, position, batch, head, states)
                outputs[view.first_row + position] = output
        final = {state.name: array.entries for state, array in states.items()}
        return [outputs[row] for row in sorted(outputs)], final

    def _start(self) -> dict[program.StateClause, Array]:
        return {
            state: Array(state.dims, self._constant_entries(state.dims, state)) for state in self._recurrence.states
        }

    def _constant_entries(self, dims: Sequence[Dim], state: program.StateClause) -> Any:
        if not dims:
            return complex(state.start) if state.is_complex else state.start
        size = dims[0] if isinstance(dims[0], int) else self._call.whole.size(str(dims[0]), state.span)
        return (self._constant_entries(dims[1:], state),) * size

    def _order(self, view: SequenceView, batch: int, head: int) -> list[int]:
        scan = self._recurrence.scan
        if scan is None:
            return list(range(view.keys))
        meaning = self._call.meanings.of(scan)
        order_values = [meaning(self._frame(view, t, head, batch)) for t in range(view.keys)]
        if len(set(order_values)) < len(order_values):
            message = "`scan` has the same value for two tokens"
            raise EvaluationError("A901", message, scan.span, "use an expression that differs for all tokens")
        return sorted(range(view.keys), key=lambda t: cast("int", order_values[t]))

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
        token_states = dict(states)
        if reset is not None and self._call.meanings.of(reset)(frame):
            token_states = self._start()
        line = _TokenLines(self._call, frame, token_states, dict(self._bound))
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
    """Evaluates the lines of a recurrence for one token."""

    call: Evaluator
    frame: EvaluationFrame
    states: dict[program.StateClause, Array]
    bound: dict[program.Binder, AxisValue]

    def over(self, node: program.Expr, state: program.StateClause) -> Array:
        """Return a value broadcast over all axes of a state."""
        return Array(state.dims, _spread(self.of(node), state.dims, self.states[state].entries))

    def range(self, key_range: program.KeyRange) -> range:
        """Return the values of a range."""
        return range(cast("int", self.of(key_range.low)), cast("int", self.of(key_range.high)))

    def of(self, node: program.Expr) -> AxisValue:
        """Return the value of an expression."""
        match node:
            case program.StateRead(state=state):
                current = self.states[state]
                return current if current.axes else cast("Result", current.entries)
            case program.Local(binder=binder):
                return self.bound[binder]
            case program.Vector() | program.InputRead():
                return self._tensor(node)
            case program.DefinitionUse(definition=definition, arguments=arguments):
                arguments_by_binder = {p: self.of(a) for p, a in zip(definition.parameters, arguments, strict=True)}
                return _TokenLines(self.call, self.frame, self.states, {**self.bound, **arguments_by_binder}).of(
                    definition.body
                )
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

    def _tensor(self, node: program.Vector | program.InputRead) -> AxisValue:
        if isinstance(node, program.Vector):
            return Array(("dv" if node.tensor == "v" else "dk",), cast("tuple[float, ...]", self._leaf(node)))
        indices = [cast("int", self.of(index)) for index in node.indices]
        result = self.frame.around.element(node, indices, self.frame.head, self.frame.batch)
        if not isinstance(result, tuple):
            return result
        implied = sum(dim in ("batch", "head", "kv_head") for dim in node.input.type.dims)
        return Array(node.input.type.dims[implied + len(indices) :], result)

    def _item(self, node: program.Item) -> AxisValue:
        table, index = self.of(node.table), cast("int", self.of(node.index))
        entries = table.entries if isinstance(table, Array) else cast("tuple[Any, ...]", table)
        if not 0 <= index < len(entries):
            message = f"the index {index} is out of range for a list of {len(entries)}"
            help_ = "test the index first: `… if 0 <= i < n else …`"
            raise EvaluationError("A902", message, node.index.span, help_)
        if isinstance(table, Array) and len(table.axes) > 1:
            return Array(table.axes[1:], entries[index])
        return cast("AxisValue", entries[index])

    # --- operations --------------------------------------------------------------------------------------------------

    def _operation(self, node: program.Operation) -> AxisValue:
        if node.op in ("and", "or"):
            stop = node.op == "or"
            return next((stop for operand in node.operands if self.of(operand) is stop), not stop)
        values = [self.of(operand) for operand in node.operands]
        try:
            if node.op in _ARRAY_FUNCTIONS:
                return _ARRAY_FUNCTIONS[node.op](*values)
            if node.op == "solve":
                return self._solve(*cast("list[Array]", values))
            if node.op == "eye":
                return self._eye(node, cast("int", values[0]))
            if node.op == "part":
                index, parts = cast("tuple[int, int]", tuple(values[1:]))
                return _part(cast("Array", values[0]), index, parts)
            return _entrywise(lambda *x: _number_operation(node.op, x, floating_=node.floating), values)
        except ArithmeticFault as fault:
            help_ = "test for that case first: `… if condition else …`"
            raise EvaluationError("A901", str(fault), node.span, help_) from None

    def _solve(self, matrix: Array, vector: Array) -> Array:
        operands: list[Any] = [matrix.entries, vector.entries]
        if self.call.program.approximate is not None:
            operands.append(self.of(self.call.program.approximate))
        return Array(vector.axes, float_arithmetic.apply("solve", operands, floating=True))

    def _eye(self, node: program.Operation, size: int) -> Array:
        axis: Dim = node.operands[0].name if isinstance(node.operands[0], program.Size) else size
        return Array((axis, axis), float_arithmetic.apply("eye", (size,), floating=True))

    def _aggregate(self, node: program.Aggregate) -> AxisValue:
        values = [line.of(node.body) for line in self._iterations(node, 0)]
        match node.op:
            case "any" | "all":
                return bool(values) and any(values) if node.op == "any" else all(values)
            case "count":
                return sum(1 for value in values if value)
        if not values:
            return cast("Result", float_arithmetic.total(node.op, ()))
        name = "add" if node.op in ("sum", "mean") else node.op
        total = values[0]
        for value in values[1:]:
            total = _entrywise(lambda *x: _number_operation(name, x, floating_=node.floating), (total, value))
        if node.op == "mean":
            count = len(values)
            total = _entrywise(lambda x: _number_operation("div", (x, count), floating_=True), (total,))
        return total

    def _iterations(self, node: program.Aggregate, depth: int) -> Iterator[_TokenLines]:
        if depth == len(node.runnings):
            if node.condition is None or self.of(node.condition):
                yield self
            return
        variable = node.runnings[depth]
        assert isinstance(variable, program.RangeVariable)
        assert isinstance(variable.target, program.Binder)
        for i in range(cast("int", self.of(variable.low)), cast("int", self.of(variable.high))):
            self.frame.around.tick(node.span)
            yield from _TokenLines(self.call, self.frame, self.states, {**self.bound, variable.target: i})._iterations(
                node, depth + 1
            )


# --- arrays ----------------------------------------------------------------------------------------------------------


def _nested(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_nested, value)) if isinstance(value, list | tuple) else _number(value)


def _number(value: Any) -> float | complex:
    return value if isinstance(value, complex) else float(value)


def _spread(value: AxisValue, axes: Sequence[Dim], like: Any) -> Any:
    """Return the entries of a value broadcast over `axes`, which contain the value's axes; `like` has their sizes."""
    if not axes:
        return value.entries if isinstance(value, Array) else value
    if isinstance(value, Array) and value.axes[0] == axes[0]:
        inner_axes = value.axes[1:]
        parts = [Array(inner_axes, entry) if inner_axes else entry for entry in value.entries]
    else:
        parts = [value] * len(like)
    return tuple(_spread(part, axes[1:], inner) for part, inner in zip(parts, like, strict=True))


def _entrywise(function: Callable[..., Any], values: Sequence[AxisValue]) -> AxisValue:
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


def _at(entries: Any, indices: Sequence[int]) -> Any:
    for index in indices:
        entries = entries[index]
    return _number(entries)


def _contracted(left: Array, right: Array, i: int, j: int) -> AxisValue:
    """Return the product of two arrays summed over axis `i` of `left` and axis `j` of `right`; other axes in order."""
    left_sizes, right_sizes = _sizes(left), _sizes(right)
    shared, result_sizes = (
        left_sizes[i],
        [*left_sizes[:i], *left_sizes[i + 1 :], *right_sizes[:j], *right_sizes[j + 1 :]],
    )

    def entry(indices: Sequence[int]) -> Any:
        left_indices, right_indices = list(indices[: len(left_sizes) - 1]), list(indices[len(left_sizes) - 1 :])
        terms = (
            _at(left.entries, [*left_indices[:i], s, *left_indices[i:]])
            * _at(right.entries, [*right_indices[:j], s, *right_indices[j:]])
            for s in range(shared)
        )
        return floating_sum(terms)

    axes = (*left.axes[:i], *left.axes[i + 1 :], *right.axes[:j], *right.axes[j + 1 :])
    return Array(axes, _table(entry, result_sizes, ())) if axes else entry(())


def floating_sum(terms: Iterator[Any]) -> Any:
    """Return the correctly rounded sum of terms; if some are not finite, their IEEE 754 sum."""
    numbers = list(terms)
    if any(isinstance(term, complex) for term in numbers):
        return complex(floating_sum(z.real for z in numbers), floating_sum(z.imag for z in numbers))
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)


def _table(entry: Callable[[Sequence[int]], Any], sizes: Sequence[int], indices: tuple[int, ...]) -> Any:
    if not sizes:
        return entry(indices)
    return tuple(_table(entry, sizes[1:], (*indices, i)) for i in range(sizes[0]))


def _matmul(left: Array, right: Array) -> AxisValue:
    """Return `left @ right`, summed over the adjacent shared axis, or else over the only shared axis."""
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
    lse = float_arithmetic.logsumexp(entries)
    return Array(vector.axes, tuple(math.exp(x - lse) for x in entries))


def _number_operation(op: str, values: Sequence[Any], *, floating_: bool) -> Any:
    """Return the result of an operation on numbers, some of which may be complex."""
    if not any(isinstance(x, complex) for x in values):
        return float_arithmetic.apply(op, values, floating=floating_)
    try:
        return _COMPLEX_FUNCTIONS[op](*(x if isinstance(x, complex) else float(x) for x in values))
    except OverflowError:
        return complex(math.nan, math.nan)


_COMPLEX_FUNCTIONS: dict[str, Callable[..., Any]] = {
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


def _part(vector: Array, index: int, parts: int) -> Array:
    return Array(
        (f"{vector.axes[0]}/{parts}",), float_arithmetic.apply("part", (vector.entries, index, parts), floating=True)
    )


def _vector_function(op: str) -> Callable[[Array], Array]:
    return lambda vector: Array(vector.axes, float_arithmetic.apply(op, (vector.entries,), floating=True))


_ARRAY_FUNCTIONS: dict[str, Callable[..., AxisValue]] = {
    "matmul": _matmul,
    "outer": _outer,
    "diag": _diagonal,
    "softmax": _softmax,
    "dot": lambda a, b: _contracted(a, b, 0, 0),
    "normalised": _vector_function("normalised"),
    "rms": _vector_function("rms"),
}
