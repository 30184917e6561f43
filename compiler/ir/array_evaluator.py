"""Evaluation of a specialised relation on numpy arrays, in 64-bit integers or Python integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.ir.aggregates import (
    TooManyStepsError,
    lanes_read,
    narrowed,
    spend,
)
from attnc.compiler.ir.integer_operations import INTEGER_FUNCTIONS, on_arrays
from attnc.compiler.ir.nodes import (
    Arith,
    Bool,
    Compare,
    Const,
    Coord,
    DataRead,
    ExactSelect,
    Index,
    Linear,
    Not,
    Position,
    Reduce,
    TableRead,
    Truth,
    UnitCondition,
    Var,
    is_truth,
    not_a_truth,
    not_an_integer,
)
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

Array = NDArray[Any]
Int64 = NDArray[np.int64]
Active = NDArray[np.bool_]

WORD = 1 << 63

ONE_LANE: Active = np.ones((1, 1), dtype=np.bool_)
"""A single active lane, broadcast to every row and key."""

AT_ONCE = 1 << 21
"""Maximum number of values over all lanes for which an aggregate is evaluated without a loop."""


@dataclass(frozen=True, slots=True)
class PointBatch:
    """The values of variables, one lane per entry, and the query and key that a fault in each lane reports."""

    variables: Mapping[Var, Int64]
    q: Int64
    k: Int64

    def __len__(self) -> int:
        return len(self.q)

    def take(self, which: NDArray[Any] | slice, more: Mapping[Var, Int64] | None = None) -> PointBatch:
        """Return a selection of the lanes, by mask or number, with `more` variables."""
        variables = {variable: value[which] for variable, value in self.variables.items()}
        return PointBatch({**variables, **(more or {})}, self.q[which], self.k[which])


Decide = Callable[[Index, PointBatch, Mapping[Index, Span]], Active]
"""A function that decides a condition on units in every lane; see `block_conditions.decide`."""


class ArrayEvaluator:
    """One evaluation; `active` marks the lanes whose value is needed.

    `known`: nodes whose values are given. `decide`: decides conditions on units, None for expressions without any.
    `tensors`: the tensors of which data with a `cut` are parts, by name.
    """

    def __init__(
        self,
        q: Array,
        k: Array,
        wide: bool,
        origins: Mapping[Index, Span],
        known: Mapping[Index, Array] | None = None,
        *,
        decide: Decide | None,
        tensors: Mapping[str, Array] | None = None,
    ) -> None:
        self._decide = decide
        self._tensors = tensors or {}
        self._places = {"q": q, "k": k}
        self._known = dict(known or {})
        self._wide = wide
        self._dtype: Any = object if wide else np.int64
        self._origins = origins
        self._variables: dict[Var, Array] = {}

    # --- truth values ---

    def truth(self, node: Index, active: Active) -> Active:
        """Return the truth value of a node in each lane."""
        match node:
            case Truth():
                return np.full((1, 1), node.value)
            case Compare():
                return self._compare(node, active)
            case Bool():
                return self._junction(node, active)
            case Not():
                return ~self.truth(node.operand, active)
            case ExactSelect():
                condition = self.truth(node.condition, active)
                then = self.truth(node.then, active & condition)
                return np.where(condition, then, self.truth(node.otherwise, active & ~condition))
            case DataRead():
                return np.asarray(self._read(node, active), dtype=np.bool_)
            case Reduce():
                return np.asarray(self._reduce(node, active), dtype=np.bool_)
            case UnitCondition():
                return self._rounded(node, active)
            case _:
                not_a_truth(node)

    def _compare(self, node: Compare, active: Active) -> Active:
        """Compare with 0; where terms depend on rows or keys alone, compare the row part with the key part."""
        if self._wide or not isinstance(node.value, Linear):
            value = self.integer(node.value, active)
            return np.asarray(value >= 0 if node.op == "ge" else value == 0, dtype=np.bool_)
        rows: Array = np.array([[node.value.constant]], dtype=np.int64)
        keys: Array = np.zeros((1, 1), dtype=np.int64)
        for term, coefficient in node.value.terms:
            term_value = self.integer(term, active)
            if term_value.shape[-1] == 1:
                rows = rows + term_value * coefficient
            else:
                keys = keys - term_value * coefficient
        return np.asarray(rows >= keys if node.op == "ge" else rows == keys)

    def bind(self, variable: Var, value: Array) -> None:
        """Set the value of a variable in each lane."""
        self._variables[variable] = value.astype(self._dtype)

    def _rounded(self, node: UnitCondition, active: Active) -> Active:
        """Evaluate each pair of units once: all rows of a unit are alike, and all keys of a unit."""
        assert self._decide is not None
        q, k = self._places["q"].ravel().astype(np.int64), self._places["k"].ravel().astype(np.int64)
        q_units, k_units = self._unit_values(node.q_units, len(q)), self._unit_values(node.k_units, len(k))
        (q_first, rows), (k_first, keys) = _distinct(q_units), _distinct(k_units)
        kept = np.zeros((len(q_first), len(k_first)), dtype=np.bool_)
        row, key = np.nonzero(np.broadcast_to(active, (len(q), len(k))))
        kept[rows[row], keys[key]] = True
        a, b = np.nonzero(kept)
        q_index, k_index = q_first[a], k_first[b]
        variables = dict(zip(node.q_vars, q_units[:, q_index], strict=True))
        variables |= dict(zip(node.k_vars, k_units[:, k_index], strict=True))
        kept[a, b] = self._decide(node.keep, PointBatch(variables, q[q_index], k[k_index]), self._origins)
        return kept[rows[:, None], keys[None, :]]

    def _unit_values(self, units: tuple[Index, ...], length: int) -> Int64:
        """The values of units for each row, or for each key: (units, length)."""
        everywhere = np.ones((1, 1), dtype=np.bool_)
        values = [self.integer(unit, everywhere).astype(np.int64).ravel() for unit in units]
        return np.stack([np.broadcast_to(value, length) for value in values])

    def _junction(self, node: Bool, active: Active) -> Active:
        conjunction = node.op == "and"
        result = np.full((1, 1), conjunction)
        for i, operand in enumerate(node.operands):
            open_lanes = active & (result if conjunction else ~result) if i else active
            if not open_lanes.any():
                break
            value = self.truth(operand, open_lanes)
            result = result & value if conjunction else result | value
        return result

    # --- integers ---

    def integer(self, node: Index, active: Active) -> Array:
        """Return the integer of a node in each lane."""
        match node:
            case Const():
                return np.array([[node.value]], dtype=self._dtype)
            case Position() | Var():
                return self._places[node.name] if isinstance(node, Position) else self._variables[node]
            case Linear():
                return self._linear(node, active)
            case Coord():
                return self._coordinate(node, active)
            case Arith():
                value = self._known.get(node)
                return self._remember(node, self._arith(node, active), active) if value is None else value
            case TableRead():
                index = self._checked_index(node, self.integer(node.index, active), len(node.values), active)
                return np.array(node.values, dtype=self._dtype)[index]
            case DataRead():
                return self._read(node, active).astype(self._dtype)
            case ExactSelect():
                condition = self.truth(node.condition, active)
                then = self.integer(node.then, active & condition)
                return np.where(condition, then, self.integer(node.otherwise, active & ~condition))
            case Reduce():
                return self._reduce(node, active)
            case _:
                not_an_integer(node)

    def _linear(self, node: Linear, active: Active) -> Array:
        total = np.array([[node.constant]], dtype=self._dtype)
        for term, coefficient in node.terms:
            value = self.integer(term, active)
            total = total + (value if coefficient == 1 else value * coefficient)
        return self._in_word(node, total, active)

    def _coordinate(self, node: Coord, active: Active) -> Array:
        if node in self._known:
            return self._known[node]
        position = self.integer(node.position, active) - self.integer(node.offset, active)
        value = position // self.integer(node.stride, active)
        return value if node.extent is None else value % self.integer(node.extent, active)

    def _remember(self, node: Index, value: Array, active: Active) -> Array:
        """Return `value`; remember it if all lanes are active and it depends on one of q and k, without variables."""
        if active.size == 1 and active.item() and not self._variables and 1 in value.shape:
            self._known[node] = value
        return value

    def _arith(self, node: Arith, active: Active) -> Array:
        operands = [self.integer(operand, active) for operand in node.operands]
        match node.op:
            case "mul":
                return self._in_word(node, operands[0] * operands[1], active)
            case "floordiv":
                return operands[0] // self._divisor(node, operands[1], active)
            case "mod":
                return operands[0] % self._divisor(node, operands[1], active)
            case "pow":
                return self._power(node, operands[0], operands[1], active)
            case "min" | "max":
                extreme = np.minimum if node.op == "min" else np.maximum
                result = operands[0]
                for operand in operands[1:]:
                    result = extreme(result, operand)
                return result
            case "abs":
                return self._in_word(node, np.abs(operands[0]), active)
            case _:
                return self._function(node, operands, active)

    def _function(self, node: Arith, operands: list[Array], active: Active) -> Array:
        if not INTEGER_FUNCTIONS[node.op].of_naturals:
            return on_arrays(node.op, *operands)
        for operand in operands:
            self._fault(node, operand < 0, active, f"{node.op} of a negative number")
        return on_arrays(node.op, *(np.where(operand < 0, 0, operand) for operand in operands))

    def _power(self, node: Arith, base: Array, exponent: Array, active: Active) -> Array:
        self._fault(node, exponent < 0, active, "a negative exponent")
        if not self._wide:  # analysis has shown that no power exceeds 64 bits in any lane
            return np.asarray(np.power(base, np.maximum(exponent, 0)), dtype=np.int64)
        huge = (exponent > 63) & (np.abs(base) > 1)
        self._fault(node, huge, active, "a number beyond 64 bits")
        safe = np.where((exponent < 0) | huge, 0, exponent)
        safe = np.where(exponent > 64, 64 + exponent % 2, safe)  # for bases 0, 1 and -1 only the parity matters
        value = np.power(base.astype(object), np.where(huge, 0, safe).astype(object))
        return self._in_word(node, value, active).astype(self._dtype)

    # --- aggregates and reads ---

    def _reduce(self, node: Reduce, active: Active) -> Array:
        """Evaluate an aggregate, once for all lanes that share its value."""
        shape = lanes_read(node, self._places, self._variables)
        narrow, variables = narrowed(active, shape), dict(self._variables)
        try:
            return self._reduced(node, narrow, shape)
        except TooManyStepsError as error:
            raise error.at(self._origins.get(node)) from None
        except EvaluationError:
            if narrow is active:
                raise
            self._variables = variables  # evaluate again in all lanes, to report the first pair with a fault
            return self._reduced(node, active, shape)

    def _reduced(self, node: Reduce, active: Active, shape: tuple[int, ...]) -> Array:
        low, high = self.integer(node.low, active), self.integer(node.high, active)
        result, nonempty = self._start(node), np.zeros((1, 1), dtype=np.bool_)
        running = np.broadcast_to(active & (low < high), np.broadcast_shapes(active.shape, low.shape, high.shape))
        if running.any():
            first = int(np.where(running, low, WORD - 1).min())
            last = int(np.where(running, high, -WORD).max())
            shape = np.broadcast_shapes(shape, running.shape)
            at_once = self._reduce_at_once(node, active, low, high, range(first, last), shape)
            if at_once is not None:
                return at_once
            spend(node, last - first, prod(shape), self._origins, wide=self._wide)
            for i in range(first, last):
                self._variables[node.var] = np.full((1, 1), i, dtype=self._dtype)
                inside = active & (low <= i) & (i < high)
                inside = inside & self.truth(node.condition, inside)
                if inside.any():
                    result = self._step(node, result, nonempty, inside)
                    nonempty = nonempty | inside
        if node.op in ("min", "max"):
            self._fault(node, ~nonempty, active, f"`{node.op}` of nothing")
        return result

    def _reduce_at_once(
        self, node: Reduce, active: Active, low: Array, high: Array, span: range, shape: tuple[int, ...]
    ) -> Array | None:
        """Evaluate an aggregate with an axis for its variable; None where that is too much, or a value is a fault.

        A fault counts only if the loop, which stops once the result is known, would reach it.
        """
        if self._wide or prod(shape) * (span.stop - span.start) > AT_ONCE:
            return None
        spend(node, 1, prod(shape) * (span.stop - span.start), self._origins, wide=False)
        i = np.arange(span.start, span.stop, dtype=np.int64).reshape(-1, *[1] * len(shape))
        variables = dict(self._variables)
        self._variables[node.var] = i
        try:
            inside = active & (low <= i) & (i < high)
            inside = inside & self.truth(node.condition, inside)
            return self._collected(node, inside, active)
        except TooManyStepsError:
            raise
        except EvaluationError:
            return None
        finally:
            self._variables = variables

    def _collected(self, node: Reduce, inside: Active, active: Active) -> Array:
        """Reduce the first axis, which holds the values of an aggregate's variable."""
        if is_truth(node):
            body = self.truth(node.body, inside)
            return np.asarray((inside & body).any(0) if node.op == "any" else (~inside | body).all(0))
        body = self.integer(node.body, inside)
        if node.op == "sum":
            return np.asarray(np.where(inside, body, 0).sum(0))
        self._fault(node, ~inside.any(0), active, f"`{node.op}` of nothing")
        if node.op == "min":
            return np.asarray(np.where(inside, body, WORD - 1).min(0))
        return np.asarray(np.where(inside, body, -WORD).max(0))

    def _start(self, node: Reduce) -> Array:
        if is_truth(node):
            return np.full((1, 1), node.op == "all")
        return np.zeros((1, 1), dtype=self._dtype)

    def _step(self, node: Reduce, result: Array, nonempty: Active, inside: Active) -> Array:
        match node.op:
            case "any":
                return result | (inside & self.truth(node.body, inside & ~result))
            case "all":
                return result & (~inside | self.truth(node.body, inside & result))
            case "sum":
                value = self.integer(node.body, inside)
                return self._in_word(node, result + np.where(inside, value, 0), inside)
            case _:
                value = self.integer(node.body, inside)
                extreme = np.minimum if node.op == "min" else np.maximum
                return np.where(inside, np.where(nonempty, extreme(result, value), value), result)

    def _read(self, node: DataRead, active: Active) -> Array:
        indices = [
            self._checked_index(node, self.integer(index, active), size, active)
            for index, size in zip(node.indices, node.data.array.shape, strict=True)
        ]
        if not indices and node.data.cut is None:
            return node.data.array.reshape(1, 1)
        if 0 in node.data.array.shape:
            return np.zeros((1, 1), dtype=node.data.array.dtype)
        data = node.data
        array = data.array if data.cut is None else self._tensors[data.name][data.cut]
        return np.asarray(array[tuple(np.broadcast_arrays(*indices))])

    # --- faults ---

    def _checked_index(self, node: Index, index: Array, size: int, active: Active) -> NDArray[np.int64]:
        outside = (index < 0) | (index >= size)
        name = f"`{node.data.name}`" if isinstance(node, DataRead) else "a list"
        self._fault(node, outside, active, f"an index outside {name}, which has {size} entries there")
        return np.where(outside, 0, index).astype(np.int64)

    def _divisor(self, node: Index, divisor: Array, active: Active) -> Array:
        zero = divisor == 0
        self._fault(node, zero, active, "division by zero")
        return np.where(zero, 1, divisor)

    def _in_word(self, node: Index, value: Array, active: Active) -> Array:
        if self._wide:
            self._fault(node, (value >= WORD) | (value < -WORD), active, "a number beyond 64 bits")
        return value

    def _fault(self, node: Index, fault: Any, active: Active, what: str) -> None:
        faulty = np.asarray(fault, dtype=np.bool_)
        if not faulty.any():
            return
        lanes = faulty & active
        if not lanes.any():
            return
        shapes = (lanes.shape, self._places["q"].shape, self._places["k"].shape)
        full = np.broadcast_to(lanes, np.broadcast_shapes(*shapes))
        pair = tuple(np.argwhere(full)[0][-2:])
        q, k = (np.broadcast_to(self._places[place], full.shape[-2:])[pair] for place in ("q", "k"))
        raise EvaluationError("A901", f"{what}, at query row {q} and key {k}", self._origins.get(node))


def _distinct(values: Int64) -> tuple[Int64, Int64]:
    """The index of one column of each kind, and the number of the kind of every column."""
    _, first, number = np.unique(values, axis=1, return_index=True, return_inverse=True)
    return first, number.reshape(-1)
