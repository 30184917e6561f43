"""Integers and truth values on boxes: bounds, hashes, and arithmetic on both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce as accumulate
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.hashing import Hash, combine, constant_hash, mix
from attnc.compiler.ir import Index, Var
from attnc.compiler.ir.integer_operations import INTEGER_FUNCTIONS, bit_length, on_arrays

LIMIT = 1 << 61
"""Bounds of ±LIMIT mean that the value is unbounded."""
FAR = 1 << 31
"""Bound for out-of-range table entries; larger than any position."""

Int64 = NDArray[np.int64]

FALSE, UNKNOWN, TRUE = -1, 0, 1


@dataclass(frozen=True, slots=True)
class Ints:
    """The bounds of an integer on each box (ends included), and its decomposition `shape + offset`."""

    low: Int64
    high: Int64
    shape: Hash
    offset: Int64


@dataclass(frozen=True, slots=True)
class Truths:
    """A truth value on each box: FALSE or TRUE on all of the box, or UNKNOWN; `key` identifies the undecided part."""

    state: NDArray[np.int8]
    key: Hash


TRUE_KEY = constant_hash("true")
_FALSE_KEY = constant_hash("false")


NO_SHAPE: Hash = np.zeros(1, dtype=np.uint64)
"""The shape of a constant: nothing varies inside the box."""

NO_OFFSET: Int64 = np.zeros(1, dtype=np.int64)

V = TypeVar("V")


def bounds_alone(low: Int64, high: Int64) -> Ints:
    """Return bounds without a decomposition, for analyses without keys."""
    return Ints(low, high, NO_SHAPE, NO_OFFSET)


def variable_name(variable: Var) -> str:
    """Return a name that distinguishes variables with the same spelling."""
    return f"{variable.name}'{variable.serial}"


def computed_once(known: dict[Index, V], node: Index, compute: Callable[[Index], V]) -> V:
    """Return the value of a node, computed at its first use."""
    if node not in known:
        known[node] = compute(node)
    return known[node]


def largest(bound: Int64) -> int:
    """Return the largest magnitude of bounds, 0 for no bounds."""
    return int(np.abs(bound).max(initial=0))


def named_hash(*parts: str | int | tuple[int, ...] | Hash | Int64) -> Hash:
    """Return a hash of names, constants, shapes and offsets."""
    return combine(*map(_hashed, parts))


def _hashed(part: str | int | tuple[int, ...] | Hash | Int64) -> Hash:
    if not isinstance(part, np.ndarray):
        return constant_hash(part)
    return mix(part) if part.dtype == np.int64 else part.astype(np.uint64, copy=False)


def decided_truths(state: NDArray[np.int8], key: Hash) -> Truths:
    """Return truth values in which all TRUE boxes share one key, and all FALSE boxes another."""
    if key is NO_SHAPE:
        return Truths(state, key)
    return Truths(state, np.where(state == TRUE, TRUE_KEY, np.where(state == FALSE, _FALSE_KEY, key)))


def decided(state: NDArray[np.int8]) -> Truths:
    """Return states without keys."""
    return Truths(state, NO_SHAPE)


def negated(inner: Truths, *, keyed: bool) -> Truths:
    """Return the negation."""
    return decided_truths(-inner.state, named_hash("not", inner.key)) if keyed else decided(-inner.state)


def junction_state(op: str, a: NDArray[np.int8], b: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return the `and` or the `or` of two states."""
    return np.minimum(a, b) if op == "and" else np.maximum(a, b)


def junction(op: str, operands: list[Truths], *, keyed: bool) -> Truths:
    """Return the `and` or the `or` of operands; an operand that is neutral on a box does not enter its key."""
    state = accumulate(lambda a, b: junction_state(op, a, b), (o.state for o in operands))
    if not keyed:
        return decided(state)
    neutral = TRUE if op == "and" else FALSE
    key = named_hash(op)
    for operand in operands:
        key = np.where(operand.state == neutral, key, named_hash(key, operand.key))
    return decided_truths(state, key)


def picked(state: NDArray[Any], then: NDArray[Any], otherwise: NDArray[Any], undecided: NDArray[Any]) -> NDArray[Any]:
    """Return `then` where the state is TRUE, `otherwise` where it is FALSE, else `undecided`."""
    return np.where(state == TRUE, then, np.where(state == FALSE, otherwise, undecided))


def sum_hash(a: Hash, b: Hash) -> Hash:
    """Return the hash of a sum of shapes; addition is commutative, and a constant's shape is neutral."""
    return a + b


def wrapped_product(offset: Int64, factor: int) -> Int64:
    """Multiply offsets modulo 2^64, the modulus in which offsets are compared."""
    return np.asarray(offset.astype(np.uint64) * np.uint64(factor % (1 << 64)), dtype=np.uint64).astype(np.int64)


def is_positive_constant(b: Ints) -> bool:
    """Whether an integer is a known positive constant on every box."""
    return bool(np.all((b.low == b.high) & (b.low > 0) & (b.low < LIMIT)))


def divided(bound: Int64, divisor: Int64) -> Int64:
    """Divide bounds by positive divisors; unlimited bounds stay unlimited."""
    return np.where(np.abs(bound) >= LIMIT, bound, bound // divisor)


def counted(n: Int64) -> Ints:
    """Return exact counts as integers on boxes."""
    return Ints(n, n, NO_SHAPE, n)


def function_bounds(op: str, operands: list[Ints]) -> tuple[Int64, Int64]:
    """Return the bounds of an exact function of operands."""
    special = _BOUNDS.get(op)
    if special is not None:
        return special(*operands)
    function = INTEGER_FUNCTIONS[op]
    if function.is_increasing and function.of_naturals:
        low = on_arrays(op, *(np.maximum(operand.low, 0) for operand in operands))
        return low, on_arrays(op, *(_word(operand.high) for operand in operands))
    unbounded = np.full(1, LIMIT, dtype=np.int64)
    return np.zeros(1, dtype=np.int64) if function.is_natural else -unbounded, unbounded


def _word(high: Int64) -> Int64:
    """Return an upper bound of at least 0; a saturated bound becomes the largest 64-bit integer."""
    return np.where(high >= LIMIT, np.iinfo(np.int64).max, np.maximum(high, 0))


def _power_bounds(base: Ints, exponent: Ints) -> tuple[Int64, Int64]:
    size = np.maximum(np.abs(base.low), np.abs(base.high)).astype(np.float64)
    with np.errstate(over="ignore"):
        top = np.minimum(
            np.power(np.maximum(size, 1.0), np.maximum(exponent.high, 0).astype(np.float64)) + 1, float(LIMIT)
        )
        floor_exponent = np.clip(exponent.low, 0, 64).astype(np.float64)
        bottom = np.minimum(np.power(np.maximum(base.low, 0).astype(np.float64), floor_exponent), float(LIMIT))
    high = _power_exact(base.high, exponent.high, top)
    low = np.where(
        base.low >= 0, _power_exact(base.low, np.clip(exponent.low, 0, 64), np.floor(bottom * (1 - 1e-9))), -high
    )
    zero_base = (base.low == 0) & (exponent.high > 0)
    return np.where(zero_base, 0, low), np.maximum(high, 1)


def _power_exact(base: Int64, exponent: Int64, fallback: NDArray[np.float64]) -> Int64:
    """Return small powers of a nonnegative base exactly, and the float bound `fallback` for all others."""
    small = (fallback < float(1 << 52)) & (base >= 0) & (exponent >= 0)
    exact = np.round(
        np.power(np.where(small, base, 1).astype(np.float64), np.where(small, exponent, 0).astype(np.float64))
    )
    return np.where(small, exact, np.minimum(fallback, float(LIMIT))).astype(np.int64)


def _and_bounds(a: Ints, b: Ints) -> tuple[Int64, Int64]:
    """Return bounds of `a & b`, which is at most either operand that is nonnegative."""
    both_nonnegative, one_nonnegative = (a.low >= 0) & (b.low >= 0), (a.low >= 0) | (b.low >= 0)
    high = np.where(a.low >= 0, a.high, np.where(b.low >= 0, b.high, np.maximum(a.high, b.high)))
    high = np.where(both_nonnegative, np.minimum(a.high, b.high), np.maximum(high, 0))
    return np.where(one_nonnegative, 0, -_next_power(a, b)), high


def _digit_bounds(a: Ints, b: Ints) -> tuple[Int64, Int64]:
    """Return bounds of a number whose binary digits are those of the operands, combined one by one."""
    power = _next_power(a, b)
    low = np.where((a.low >= 0) & (b.low >= 0), 0, -power)
    return low, np.where(power >= LIMIT, LIMIT, power - 1)


def _next_power(a: Ints, b: Ints) -> Int64:
    size = np.maximum(np.maximum(np.abs(a.low), np.abs(a.high)), np.maximum(np.abs(b.low), np.abs(b.high)))
    bits = np.minimum(bit_length(size) + 1, 61)
    return np.asarray(np.left_shift(np.int64(1), bits), dtype=np.int64)


_BOUNDS: Mapping[str, Callable[[Ints, Ints], tuple[Int64, Int64]]] = {
    "pow": _power_bounds,
    "bitand": _and_bounds,
    "bitor": _digit_bounds,
    "xor": _digit_bounds,
}
"""Bounds of operations that are not increasing."""
