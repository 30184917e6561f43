"""Exact evaluation of specialised relations on numpy arrays: what every partial tile and every mask comes from.

Values are int64 where interval analysis shows that 64 bits are enough for every step; otherwise Python integers, so
that an overflow is found and never wraps. A fault (overflow, division by zero, an index out of range) counts only in
lanes that `and`, `or` and `if` leave alive; elsewhere the operand is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.ir import (
    Arith,
    Bool,
    Choice,
    Const,
    Coord,
    DataRead,
    Index,
    Linear,
    Not,
    Place,
    Reduce,
    Sign,
    TableRead,
    Truth,
    Var,
    is_truth,
)
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

Array = NDArray[Any]
Lanes = NDArray[np.bool_]

WORD = 1 << 63


def mask(
    relation: Index,
    rows: tuple[int, int],
    keys: tuple[int, int],
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool | None = None,
) -> NDArray[np.bool_]:
    """The relation on rows `start .. stop` and keys `start .. stop`: bool (rows, keys).

    `wide`: whether 64 bits may be too few there, where that is known. Raises EvaluationError on a fault, with the place
    in the source where it is known.
    """
    wide = not fits_word(relation, rows, keys) if wide is None else wide
    kind: Any = object if wide else np.int64
    q = np.arange(*rows, dtype=np.int64).astype(kind)[:, None]
    k = np.arange(*keys, dtype=np.int64).astype(kind)[None, :]
    evaluator = _Evaluator(q, k, wide, origins or {})
    shape = (rows[1] - rows[0], keys[1] - keys[0])
    if 0 in shape:
        return np.zeros(shape, dtype=np.bool_)
    value = evaluator.truth(relation, np.ones((1, 1), dtype=np.bool_))
    return np.ascontiguousarray(np.broadcast_to(value, shape))


def mask_at(
    relation: Index,
    q: NDArray[np.int64],
    k: NDArray[np.int64],
    alive: Lanes,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
) -> Lanes:
    """The relation on rows `q` and keys `k` where `alive` (rows, keys) has them, false elsewhere.

    Raises EvaluationError on a fault there.
    """
    if not alive.any():
        return np.zeros_like(alive)
    kind: Any = object if wide else np.int64
    evaluator = _Evaluator(q.astype(kind)[:, None], k.astype(kind)[None, :], wide, origins or {})
    return np.asarray(evaluator.truth(relation, alive) & alive)


def values(node: Index, rows: tuple[int, int], keys: tuple[int, int]) -> NDArray[np.int64]:
    """An integer on rows and keys `start .. stop`: (rows, keys).

    Raises EvaluationError on a fault.
    """
    wide = not fits_word(node, rows, keys)
    kind: Any = object if wide else np.int64
    q = np.arange(*rows, dtype=np.int64).astype(kind)[:, None]
    k = np.arange(*keys, dtype=np.int64).astype(kind)[None, :]
    value = _Evaluator(q, k, wide, {}).integer(node, np.ones((1, 1), dtype=np.bool_))
    return np.broadcast_to(value, (rows[1] - rows[0], keys[1] - keys[0])).astype(np.int64)


class _Evaluator:
    """One evaluation; `alive` marks the lanes whose value is asked for."""

    def __init__(self, q: Array, k: Array, wide: bool, origins: Mapping[Index, Span]) -> None:
        self._places = {"q": q, "k": k}
        self._wide = wide
        self._dtype: Any = object if wide else np.int64
        self._origins = origins
        self._variables: dict[Var, Array] = {}

    # --- truth values ---

    def truth(self, node: Index, alive: Lanes) -> Lanes:
        match node:
            case Truth():
                return np.full((1, 1), node.value)
            case Sign():
                value = self.integer(node.value, alive)
                return np.asarray(value >= 0 if node.op == "ge" else value == 0, dtype=np.bool_)
            case Bool():
                return self._junction(node, alive)
            case Not():
                return ~self.truth(node.operand, alive)
            case Choice():
                condition = self.truth(node.condition, alive)
                then = self.truth(node.then, alive & condition)
                return np.where(condition, then, self.truth(node.otherwise, alive & ~condition))
            case DataRead():
                return np.asarray(self._read(node, alive), dtype=np.bool_)
            case Reduce():
                return np.asarray(self._reduce(node, alive), dtype=np.bool_)
            case _:
                raise AssertionError(f"not a truth value: {node}")

    def _junction(self, node: Bool, alive: Lanes) -> Lanes:
        conjunction = node.op == "and"
        result = np.full((1, 1), conjunction)
        for operand in node.operands:
            open_lanes = alive & (result if conjunction else ~result)
            if not open_lanes.any():
                break
            value = self.truth(operand, open_lanes)
            result = result & value if conjunction else result | value
        return result

    # --- integers ---

    def integer(self, node: Index, alive: Lanes) -> Array:
        match node:
            case Const():
                return np.full((1, 1), node.value, dtype=self._dtype)
            case Place() | Var():
                return self._places[node.name] if isinstance(node, Place) else self._variables[node]
            case Linear():
                return self._linear(node, alive)
            case Coord():
                return self._coordinate(node, alive)
            case Arith():
                return self._arith(node, alive)
            case TableRead():
                index = self._checked_index(node, self.integer(node.index, alive), len(node.values), alive)
                return np.array(node.values, dtype=self._dtype)[index]
            case DataRead():
                return self._read(node, alive).astype(self._dtype)
            case Choice():
                condition = self.truth(node.condition, alive)
                then = self.integer(node.then, alive & condition)
                return np.where(condition, then, self.integer(node.otherwise, alive & ~condition))
            case Reduce():
                return self._reduce(node, alive)
            case _:
                raise AssertionError(f"not specialised: {node}")

    def _linear(self, node: Linear, alive: Lanes) -> Array:
        total = np.full((1, 1), node.constant, dtype=self._dtype)
        for term, coefficient in node.terms:
            total = total + self.integer(term, alive) * coefficient
        return self._in_word(node, total, alive)

    def _coordinate(self, node: Coord, alive: Lanes) -> Array:
        position = self.integer(node.position, alive) - self.integer(node.offset, alive)
        value = position // self.integer(node.stride, alive)
        return value if node.extent is None else value % self.integer(node.extent, alive)

    def _arith(self, node: Arith, alive: Lanes) -> Array:
        operands = [self.integer(operand, alive) for operand in node.operands]
        match node.op:
            case "mul":
                return self._in_word(node, operands[0] * operands[1], alive)
            case "floordiv":
                return operands[0] // self._divisor(node, operands[1], alive)
            case "mod":
                return operands[0] % self._divisor(node, operands[1], alive)
            case "pow":
                return self._power(node, operands[0], operands[1], alive)
            case "min" | "max":
                extreme = np.minimum if node.op == "min" else np.maximum
                result = operands[0]
                for operand in operands[1:]:
                    result = extreme(result, operand)
                return result
            case "abs":
                return self._in_word(node, np.abs(operands[0]), alive)
            case _:
                return self._function(node, operands, alive)

    def _function(self, node: Arith, operands: list[Array], alive: Lanes) -> Array:
        match node.op:
            case "bitand":
                return operands[0] & operands[1]
            case "bitor":
                return operands[0] | operands[1]
            case "xor":
                return operands[0] ^ operands[1]
            case _:
                negative = operands[0] < 0
                self._fault(node, negative, alive, f"{node.op} of a negative number")
                n = np.where(negative, 0, operands[0])
                return _bitlen(n) if node.op == "bitlen" else _isqrt(n)

    def _power(self, node: Arith, base: Array, exponent: Array, alive: Lanes) -> Array:
        self._fault(node, exponent < 0, alive, "a negative exponent")
        if not self._wide:  # no power passes 64 bits here, in any lane
            return np.asarray(np.power(base, np.maximum(exponent, 0)), dtype=np.int64)
        huge = (exponent > 63) & (np.abs(base) > 1)
        self._fault(node, huge, alive, "a number past 64 bits")
        calm = np.where((exponent < 0) | huge, 0, exponent)
        calm = np.where(exponent > 64, 64 + exponent % 2, calm)  # of 0, 1 and -1 only the parity matters
        value = np.power(base.astype(object), np.where(huge, 0, calm).astype(object))
        return self._in_word(node, value, alive).astype(self._dtype)

    # --- aggregates and reads ---

    def _reduce(self, node: Reduce, alive: Lanes) -> Array:
        low, high = self.integer(node.low, alive), self.integer(node.high, alive)
        result, found = self._start(node), np.zeros((1, 1), dtype=np.bool_)
        wanted = np.broadcast_to(alive & (low < high), np.broadcast_shapes(alive.shape, low.shape, high.shape))
        if wanted.any():
            first = int(np.where(wanted, low, WORD - 1).min())
            last = int(np.where(wanted, high, -WORD).max())
            for i in range(first, last):
                self._variables[node.var] = np.full((1, 1), i, dtype=self._dtype)
                inside = alive & (low <= i) & (i < high)
                inside = inside & self.truth(node.condition, inside)
                if inside.any():
                    result = self._step(node, result, found, inside)
                    found = found | inside
        if node.op in ("min", "max"):
            self._fault(node, ~found, alive, f"`{node.op}` of nothing")
        return result

    def _start(self, node: Reduce) -> Array:
        if is_truth(node):
            return np.full((1, 1), node.op == "all")
        return np.zeros((1, 1), dtype=self._dtype)

    def _step(self, node: Reduce, result: Array, found: Lanes, inside: Lanes) -> Array:
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
                return np.where(inside, np.where(found, extreme(result, value), value), result)

    def _read(self, node: DataRead, alive: Lanes) -> Array:
        at = [
            self._checked_index(node, self.integer(index, alive), size, alive)
            for index, size in zip(node.indices, node.data.array.shape, strict=True)
        ]
        if not at:
            return node.data.array.reshape(1, 1)
        if 0 in node.data.array.shape:
            return np.zeros((1, 1), dtype=node.data.array.dtype)
        return np.asarray(node.data.array[tuple(np.broadcast_arrays(*at))])

    # --- faults ---

    def _checked_index(self, node: Index, index: Array, size: int, alive: Lanes) -> NDArray[np.int64]:
        outside = (index < 0) | (index >= size)
        name = f"`{node.data.name}`" if isinstance(node, DataRead) else "a list"
        self._fault(node, outside, alive, f"an index outside {name}, which has {size} entries there")
        return np.where(outside, 0, index).astype(np.int64)

    def _divisor(self, node: Index, divisor: Array, alive: Lanes) -> Array:
        zero = divisor == 0
        self._fault(node, zero, alive, "division by zero")
        return np.where(zero, 1, divisor)

    def _in_word(self, node: Index, value: Array, alive: Lanes) -> Array:
        if self._wide:
            self._fault(node, (value >= WORD) | (value < -WORD), alive, "a number past 64 bits")
        return value

    def _fault(self, node: Index, bad: Any, alive: Lanes, what: str) -> None:
        lanes = np.asarray(bad, dtype=np.bool_) & alive
        if not lanes.any():
            return
        shapes = (lanes.shape, self._places["q"].shape, self._places["k"].shape)
        full = np.broadcast_to(lanes, np.broadcast_shapes(*shapes))
        row, column = (int(i) for i in np.argwhere(full)[0])
        q, k = self._places["q"][row, 0], self._places["k"][0, column]
        raise EvaluationError("A901", f"{what}, at query row {q} and key {k}", self._origins.get(node))


def _bitlen(n: Array) -> Array:
    """Bits of n ≥ 0. frexp is exact to 2^53; larger ones take the long way."""
    if n.dtype == object or int(n.max(initial=0)) >= 1 << 53:
        return _one_by_one(lambda x: x.bit_length(), n)
    return np.asarray(np.frexp(n.astype(np.float64))[1], dtype=np.int64)


def _isqrt(n: Array) -> Array:
    if n.dtype == object or int(n.max(initial=0)) >= 1 << 52:
        return _one_by_one(isqrt, n)
    root = np.sqrt(n.astype(np.float64)).astype(np.int64)
    return np.asarray(root - (root * root > n))


def _one_by_one(function: Callable[[int], int], n: Array) -> Array:
    values = [function(int(x)) for x in n.ravel()]
    return np.array(values, dtype=n.dtype).reshape(n.shape)
