"""Values of binary64 formulas for many integers at once, with a bound on the error of each value.

NumPy's functions round differently from `math`'s, so an estimate decides a `floor` only where no integer is within its
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
