"""Exact arithmetic with limits: 64-bit integers, rationals, and binary64 inside `floor` and `ceil`.

Every function returns the exact value or raises `ArithmeticFault`; no function computes a very large number first.
"""

from __future__ import annotations

import math
from fractions import Fraction

Number = int | Fraction | float
"""A `float` is the value of `sqrt`, `exp`, `log`, `log2` or a fractional power, which only `floor` or `ceil` accept."""

INT_MIN = -(2**63)
INT_MAX = 2**63 - 1
RATIONAL_BITS = 128
"""Maximum number of bits of the numerator and the denominator of a rational."""


class ArithmeticFault(ArithmeticError):  # noqa: N818 (an error in the source text)
    """Raised for an operation without an exact result: overflow, division by zero, argument out of range."""


def checked(value: Number) -> Number:
    """Return the value if it is in range. Raises `ArithmeticFault` otherwise."""
    if isinstance(value, int):
        if not INT_MIN <= value <= INT_MAX:
            raise ArithmeticFault("the result does not fit in 64 bits")
    elif isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > RATIONAL_BITS:
            raise ArithmeticFault(f"the fraction needs more than {RATIONAL_BITS} bits")
    elif not math.isfinite(value):
        raise ArithmeticFault("the result is not a finite number")
    return value


def power(base: Number, exponent: Number) -> Number:
    """Return `base ** exponent`: a rational for an integer exponent, else binary64. Checks the size beforehand."""
    if isinstance(base, float) or not isinstance(exponent, int):
        return _float_power(base, exponent)
    if base == 0 and exponent < 0:
        raise ArithmeticFault("division by zero: a negative power of 0")
    if base in (0, 1, -1) or exponent == 0:
        return int(int(base) ** abs(exponent))
    if (_bits(base) - 1) * abs(exponent) > RATIONAL_BITS:
        raise ArithmeticFault("the power does not fit in 64 bits")
    return _integer_power(base, exponent) if exponent >= 0 else 1 / Fraction(_integer_power(base, -exponent))


def _integer_power(base: int | Fraction, exponent: int) -> int | Fraction:
    if isinstance(base, int):
        return int(base**exponent)
    return Fraction(base.numerator**exponent, base.denominator**exponent)


def _bits(base: int | Fraction) -> int:
    value = Fraction(base)
    return max(abs(value.numerator).bit_length(), value.denominator.bit_length())


def _float_power(base: Number, exponent: Number) -> float:
    try:
        result: float | complex = float(base) ** float(exponent)
    except ZeroDivisionError:
        raise ArithmeticFault("division by zero: a negative power of 0") from None
    except OverflowError:
        raise ArithmeticFault("the power is too large for binary64") from None
    if isinstance(result, complex):
        raise ArithmeticFault("a fractional power of a negative number")
    return result
