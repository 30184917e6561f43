"""`floor` and `ceil` of binary64 values: tabulated on the host over the integer that they depend on."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import numpy as np

from attnc.compiler import fold
from attnc.compiler.analysis.intervals import bounds
from attnc.compiler.ir import Apply, Const, Data, Index, Node, Number, Ratio, Value, Whole
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning import floating
from attnc.spec.meaning.exact import FUNCTIONS, ArithmeticFault

MOST_ENTRIES = 1 << 22
"""Entries of a table."""


def arguments(value: Value) -> set[Index]:
    """The exact expressions, other than constants, that a value is made of."""
    parts = (part for node in value.below if isinstance(node, Ratio) for part in (node.num, node.den))
    return {part for part in parts if not isinstance(part, Const)}


def tabulated(node: Whole, rows: int, keys: int) -> Index:
    """The node, specialised to so many rows and keys, as a constant or a read of a table.

    An argument for which it has no value is outside the table, and a fault where it is asked for. Raises
    EvaluationError where the table would be too long.
    """
    found = arguments(node.value)
    if not found:
        return fold.const(_entry(node, None, 0))
    (argument,) = found
    low, high = bounds(argument, (0, max(rows, 1)), (0, max(keys, 1)))
    if high - low >= MOST_ENTRIES:
        message = f"`{node.op}` of a rounded number of {high - low + 1} values"
        raise EvaluationError("A908", message, None, f"make the range of its argument shorter than {MOST_ENTRIES}")
    first, data = _table(node, argument, low, high)
    return fold.data_read(data, (fold.sub(argument, fold.const(first)),))


@lru_cache(maxsize=16)  # a table has up to MOST_ENTRIES
def _table(node: Whole, argument: Index, low: int, high: int) -> tuple[int, Data]:
    """The longest stretch of arguments with values, from its first: where it begins, and the values."""
    best: tuple[int, list[int]] = (low, [])
    entries: list[int] = []
    for i in range(low, high + 1):
        try:
            entries.append(_entry(node, argument, i))
        except (ArithmeticFault, EvaluationError):
            entries = []
        if len(entries) > len(best[1]):
            best = i + 1 - len(entries), entries
    return best[0], Data(node.op, np.array(best[1], dtype=np.int64))


def _entry(node: Whole, argument: Index | None, at: int) -> int:
    known: dict[Node, Fraction | float] = {}
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
                result = floating.apply(below.op, [known[o] for o in below.operands], floating=True)
                assert isinstance(result, int | float | Fraction)
                known[below] = result
    value = known[node.value]
    if isinstance(value, float) and not np.isfinite(value):
        raise ArithmeticFault("the result is not a finite number")
    return int(FUNCTIONS[node.op](value))
