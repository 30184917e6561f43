"""Tables of `floor` and `ceil` of binary64 values, computed on the host over the integer on which they depend.

Many entries are estimated at once, with a bound on the error of each. NumPy's functions round differently from
`math`'s, so an estimate decides a `floor` only where no integer is within its error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, reduce
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.intervals import bounds
from attnc.compiler.ir import Apply, Const, Data, Index, Node, Number, Ratio, RoundToInt, Value, fold
from attnc.spec.errors import EvaluationError
from attnc.spec.exact_operations import EXACT_FUNCTIONS
from attnc.spec.meaning import float_arithmetic
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault, checked

Reals = NDArray[np.float64]

UNIT = 2.0**-49
"""Bound on the relative error of one function, with a margin: sixteen roundings."""
LARGEST = 2.0**50
"""Magnitude above which estimates decide nothing, because their errors may be as large as 1."""


@dataclass(frozen=True)
class Estimate:
    """Numbers, and a bound on their distance from the exact or scalar result; an error of inf or NaN means unknown."""

    value: Reals
    error: Reals

    @property
    def decided(self) -> NDArray[np.bool_]:
        """Mask of the entries with no integer within the error: there `floor(value)` and `ceil(value)` are exact."""
        usable = np.isfinite(self.value) & np.isfinite(self.error) & (np.abs(self.value) < LARGEST)
        value, error = np.where(usable, self.value, 0), np.where(usable, self.error, 1)
        least = value - error
        return cast("NDArray[np.bool_]", (np.floor(least) == np.floor(value + error)) & (np.floor(least) != least))


def estimated(value: Value, at: NDArray[np.int64]) -> Estimate | None:
    """Estimate a value at each integer `at` of its only argument; None where a function has no estimate."""
    estimates: dict[object, Estimate] = {}
    with np.errstate(all="ignore"):
        for below in value.below:
            match below:
                case Number():
                    estimates[below] = _rounded(np.full(1, float(below.value)))
                case Ratio():
                    num, den = (float(x.value) if isinstance(x, Const) else at for x in (below.num, below.den))
                    estimates[below] = _rounded(np.asarray(np.divide(num, den), dtype=np.float64).reshape(-1))
                case Apply() if below.op in _FUNCTIONS:
                    estimates[below] = _FUNCTIONS[below.op](*(estimates[operand] for operand in below.operands))
                case Apply():
                    return None
    estimate = estimates[value]
    return Estimate(*(np.broadcast_to(x, at.shape) for x in (estimate.value, estimate.error)))


def _rounded(value: Reals, error: Reals | float = 0.0) -> Estimate:
    """The estimate of a result, from the error that its operands cause; adds the rounding of the result."""
    return Estimate(value, 2 * error + UNIT * np.abs(value) + 2.0**-1000)


def _mul(a: Estimate, b: Estimate) -> Estimate:
    return _rounded(a.value * b.value, np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error)


def _div(a: Estimate, b: Estimate) -> Estimate:
    value, least = a.value / b.value, np.abs(b.value) - b.error
    return _rounded(value, np.where(least > 0, (a.error + np.abs(value) * b.error) / least, np.inf))


def _sqrt(a: Estimate) -> Estimate:
    value, least = np.sqrt(a.value), a.value - a.error
    return _rounded(value, np.where(least > 0, a.error / np.sqrt(least), np.inf))


def _log(function: Callable[[Reals], Reals]) -> Callable[[Estimate], Estimate]:
    def estimate(a: Estimate) -> Estimate:
        least = a.value - a.error
        return _rounded(function(a.value), np.where(least > 0, 2 * a.error / least, np.inf))

    return estimate


def _exp(a: Estimate) -> Estimate:
    value = np.exp(a.value)
    return _rounded(value, value * np.expm1(a.error))


def _pow(a: Estimate, b: Estimate) -> Estimate:
    value, least = a.value**b.value, a.value - a.error
    change = np.where(least > 0, 2 * a.error / least, np.inf)  # bound on the error of the base's logarithm
    spread = np.abs(b.value) * change + b.error * (np.abs(np.log(a.value)) + change)
    return _rounded(value, value * np.expm1(spread))


def _extremum(combine: Callable[[Reals, Reals], Reals]) -> Callable[..., Estimate]:
    def estimate(*operands: Estimate) -> Estimate:
        values, errors = ([getattr(x, side) for x in operands] for side in ("value", "error"))
        return Estimate(reduce(combine, values), reduce(np.maximum, errors))

    return estimate


_FUNCTIONS: dict[str, Callable[..., Estimate]] = {
    "add": lambda a, b: _rounded(a.value + b.value, a.error + b.error),
    "sub": lambda a, b: _rounded(a.value - b.value, a.error + b.error),
    "mul": _mul,
    "div": _div,
    "neg": lambda a: Estimate(-a.value, a.error),
    "abs": lambda a: Estimate(np.abs(a.value), a.error),
    "min": _extremum(np.minimum),
    "max": _extremum(np.maximum),
    "sqrt": _sqrt,
    "log": _log(np.log),
    "log2": _log(np.log2),
    "exp": _exp,
    "pow": _pow,
}


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
