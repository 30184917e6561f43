"""Values of binary64 formulas for many integers at once, each with a bound of its error.

NumPy's functions round otherwise than `math`'s, so an estimate decides a `floor` only where no integer is within its
error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import cast

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.ir import Apply, Const, Number, Ratio, Value

Reals = NDArray[np.float64]

UNIT = 2.0**-49
"""Relative error of one function, with room: sixteen roundings."""
LARGEST = 2.0**50
"""Estimates beyond this decide nothing: their errors may be as large as 1."""


@dataclass(frozen=True)
class Estimate:
    """Numbers, and how far at most they are from those that exact or scalar arithmetic gives; inf or NaN: unknown."""

    value: Reals
    error: Reals

    @property
    def decided(self) -> NDArray[np.bool_]:
        """Mask of the entries with no integer within the error: there `floor(value)` and `ceil(value)` are exact."""
        known = np.isfinite(self.value) & np.isfinite(self.error) & (np.abs(self.value) < LARGEST)
        value, error = np.where(known, self.value, 0), np.where(known, self.error, 1)
        least = value - error
        return cast("NDArray[np.bool_]", (np.floor(least) == np.floor(value + error)) & (np.floor(least) != least))


def estimated(value: Value, at: NDArray[np.int64]) -> Estimate | None:
    """A value for each integer that its only argument may be; None where it has a function that is not estimated."""
    known: dict[object, Estimate] = {}
    with np.errstate(all="ignore"):
        for below in value.below:
            match below:
                case Number():
                    known[below] = _rounded(np.full(1, float(below.value)))
                case Ratio():
                    num, den = (float(x.value) if isinstance(x, Const) else at for x in (below.num, below.den))
                    known[below] = _rounded(np.asarray(np.divide(num, den), dtype=np.float64).reshape(-1))
                case Apply() if below.op in _FUNCTIONS:
                    known[below] = _FUNCTIONS[below.op](*(known[operand] for operand in below.operands))
                case Apply():
                    return None
    found = known[value]
    return Estimate(*(np.broadcast_to(x, at.shape) for x in (found.value, found.error)))


def _rounded(value: Reals, error: Reals | float = 0.0) -> Estimate:
    """A result with the error of its operands and its own rounding."""
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
    change = np.where(least > 0, 2 * a.error / least, np.inf)  # of the logarithm of the base
    spread = np.abs(b.value) * change + b.error * (np.abs(np.log(a.value)) + change)
    return _rounded(value, value * np.expm1(spread))


def _of_several(least: Callable[[Reals, Reals], Reals]) -> Callable[..., Estimate]:
    def estimate(*operands: Estimate) -> Estimate:
        values, errors = ([getattr(x, side) for x in operands] for side in ("value", "error"))
        return Estimate(reduce(least, values), reduce(np.maximum, errors))

    return estimate


_FUNCTIONS: dict[str, Callable[..., Estimate]] = {
    "add": lambda a, b: _rounded(a.value + b.value, a.error + b.error),
    "sub": lambda a, b: _rounded(a.value - b.value, a.error + b.error),
    "mul": _mul,
    "div": _div,
    "neg": lambda a: Estimate(-a.value, a.error),
    "abs": lambda a: Estimate(np.abs(a.value), a.error),
    "min": _of_several(np.minimum),
    "max": _of_several(np.maximum),
    "sqrt": _sqrt,
    "log": _log(np.log),
    "log2": _log(np.log2),
    "exp": _exp,
    "pow": _pow,
}
