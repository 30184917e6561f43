"""Tables of `floor` and `ceil` of binary64 values, computed on the host over the integer on which they depend."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.intervals import bounds
from attnc.compiler.ir import Apply, Const, Data, Index, Node, Number, Ratio, RoundToInt, Value, fold
from attnc.compiler.lowering.estimates import estimated
from attnc.spec.errors import EvaluationError
from attnc.spec.exact_operations import EXACT_FUNCTIONS
from attnc.spec.meaning import float_arithmetic
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault, checked

MOST_ENTRIES = 1 << 22
"""Maximum number of entries of a table."""


def arguments(value: Value) -> set[Index]:
    """The exact expressions, other than constants, that a value depends on."""
    parts = (part for node in value.below if isinstance(node, Ratio) for part in (node.num, node.den))
    return {part for part in parts if not isinstance(part, Const)}


def tabulated(node: RoundToInt, rows: int, keys: int) -> Index:
    """Return the node, specialised to numbers of rows and keys, as a constant or a read of a table.

    Arguments at which the node has no value lie outside the table, and reading them is a fault. Raises
    EvaluationError where the table would be too long.
    """
    free = arguments(node.value)
    if not free:
        return fold.const(_entry(node, 0))
    (argument,) = free
    low, high = bounds(argument, (0, max(rows, 1)), (0, max(keys, 1)))
    if high - low >= MOST_ENTRIES:
        message = f"`{node.op}` of a rounded number takes {high - low + 1} values, more than {MOST_ENTRIES}"
        raise EvaluationError("A908", message, None, f"make the range of its argument shorter than {MOST_ENTRIES}")
    first, data = _table(node, low, high)
    return fold.data_read(data, (fold.sub(argument, fold.const(first)),))


@lru_cache(maxsize=16)  # small, because a table has up to MOST_ENTRIES entries
def _table(node: RoundToInt, low: int, high: int) -> tuple[int, Data]:
    """Tabulate the longest stretch of arguments that have values: the first argument, and the values."""
    entries, valid = _entries(node, np.arange(low, high + 1, dtype=np.int64))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], valid, [False]])))
    if not len(edges):
        return low, Data(node.op, entries[:0])
    starts, ends = edges[::2], edges[1::2]
    best = int(np.argmax(ends - starts))
    return low + int(starts[best]), Data(node.op, entries[starts[best] : ends[best]].copy())


def _entries(node: RoundToInt, integers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The entries at arguments and a mask of valid entries; entries with an undecided estimate are computed singly."""
    entries, valid = np.zeros(integers.shape, dtype=np.int64), np.ones(integers.shape, dtype=np.bool_)
    undecided = np.ones(integers.shape, dtype=np.bool_)
    estimate = estimated(node.value, integers)
    if estimate is not None:
        undecided = ~estimate.decided
        rounded = np.floor(estimate.value) if node.op == "floor" else np.ceil(estimate.value)
        entries[~undecided] = rounded[~undecided].astype(np.int64)
    for i in np.flatnonzero(undecided):
        try:
            entries[i] = _entry(node, int(integers[i]))
        except (ArithmeticFault, EvaluationError):
            valid[i] = False
    return entries, valid


def _entry(node: RoundToInt, argument: int) -> int:
    values: dict[Node, Any] = {}
    for below in node.value.below:
        match below:
            case Number():
                values[below] = below.value
            case Ratio():
                num, den = (part.value if isinstance(part, Const) else argument for part in (below.num, below.den))
                if den == 0:
                    raise ArithmeticFault("division by zero")
                values[below] = Fraction(num, den)
            case Apply():
                result = float_arithmetic.apply(below.op, [values[o] for o in below.operands], floating=True)
                values[below] = result
    value = values[node.value]
    if isinstance(value, float_arithmetic.ScaledFloat):
        value = float(value)
    if isinstance(value, float) and not np.isfinite(value):
        raise ArithmeticFault("the result is not a finite number")
    return int(checked(EXACT_FUNCTIONS[node.op].evaluate(value)))
