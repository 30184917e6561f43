"""`floor` and `ceil` of binary64 values: tabulated on the host over the integer that they depend on."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis.intervals import bounds
from attnc.compiler.ir import Apply, Const, Data, Index, Node, Number, Ratio, RoundToInt, Value
from attnc.compiler.lowering.estimates import estimated
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning import float_arithmetic
from attnc.spec.meaning.exact_arithmetic import FUNCTIONS, ArithmeticFault, checked

MOST_ENTRIES = 1 << 22
"""Entries of a table."""


def arguments(value: Value) -> set[Index]:
    """The exact expressions, other than constants, that a value is made of."""
    parts = (part for node in value.below if isinstance(node, Ratio) for part in (node.num, node.den))
    return {part for part in parts if not isinstance(part, Const)}


def tabulated(node: RoundToInt, rows: int, keys: int) -> Index:
    """The node, specialised to so many rows and keys, as a constant or a read of a table.

    An argument for which it has no value is outside the table, and a fault where it is asked for. Raises
    EvaluationError where the table would be too long.
    """
    found = arguments(node.value)
    if not found:
        return fold.const(_entry(node, 0))
    (argument,) = found
    low, high = bounds(argument, (0, max(rows, 1)), (0, max(keys, 1)))
    if high - low >= MOST_ENTRIES:
        message = f"`{node.op}` of a rounded number of {high - low + 1} values"
        raise EvaluationError("A908", message, None, f"make the range of its argument shorter than {MOST_ENTRIES}")
    first, data = _table(node, low, high)
    return fold.data_read(data, (fold.sub(argument, fold.const(first)),))


@lru_cache(maxsize=16)  # a table has up to MOST_ENTRIES
def _table(node: RoundToInt, low: int, high: int) -> tuple[int, Data]:
    """The longest stretch of arguments with values, from its first: where it begins, and the values."""
    entries, valid = _entries(node, np.arange(low, high + 1, dtype=np.int64))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], valid, [False]])))
    if not len(edges):
        return low, Data(node.op, entries[:0])
    starts, ends = edges[::2], edges[1::2]
    best = int(np.argmax(ends - starts))
    return low + int(starts[best]), Data(node.op, entries[starts[best] : ends[best]].copy())


def _entries(node: RoundToInt, at: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The entries for some arguments, and which have one; one by one where an estimate is too close to an integer."""
    entries, valid = np.zeros(at.shape, dtype=np.int64), np.ones(at.shape, dtype=np.bool_)
    open_ = np.ones(at.shape, dtype=np.bool_)
    estimate = estimated(node.value, at)
    if estimate is not None:
        open_ = ~estimate.decided
        rounded = np.floor(estimate.value) if node.op == "floor" else np.ceil(estimate.value)
        entries[~open_] = rounded[~open_].astype(np.int64)
    for i in np.flatnonzero(open_):
        try:
            entries[i] = _entry(node, int(at[i]))
        except (ArithmeticFault, EvaluationError):
            valid[i] = False
    return entries, valid


def _entry(node: RoundToInt, at: int) -> int:
    known: dict[Node, Any] = {}
    for below in node.value.below:
        match below:
            case Number():
                known[below] = below.value
            case Ratio():
                num, den = (part.value if isinstance(part, Const) else at for part in (below.num, below.den))
                if den == 0:
                    raise ArithmeticFault("division by zero")
                known[below] = Fraction(num, den)
            case Apply():
                result = float_arithmetic.apply(below.op, [known[o] for o in below.operands], floating=True)
                known[below] = result
    value = known[node.value]
    if isinstance(value, float_arithmetic.ScaledFloat):
        value = float(value)
    if isinstance(value, float) and not np.isfinite(value):
        raise ArithmeticFault("the result is not a finite number")
    return int(checked(FUNCTIONS[node.op](value)))
