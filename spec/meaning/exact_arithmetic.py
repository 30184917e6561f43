"""Exact arithmetic with limits: 64-bit integers, rationals, and binary64 inside `floor` and `ceil`.

Every function returns the exact value or raises `ArithmeticFault`; no function computes a very large number first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


def _div(a: Number, b: Number) -> Number:
    if b == 0:
        raise ArithmeticFault("division by zero")
    return a / b if isinstance(a, float) or isinstance(b, float) else Fraction(a) / Fraction(b)


def _floordiv(a: Number, b: Number) -> Number:
    if b == 0:
        raise ArithmeticFault("division by zero")
    return math.floor(a // b)


def _mod(a: Number, b: Number) -> Number:
    if b == 0:
        raise ArithmeticFault("division by zero: a remainder by 0")
    return a % b


def _clamp(x: Number, low: Number, high: Number) -> Number:
    if low > high:
        raise ArithmeticFault(f"clamp needs low <= high, got {low} > {high}")
    return min(max(x, low), high)


def _isqrt(n: Number) -> int:
    if n < 0:
        raise ArithmeticFault(f"isqrt of a negative number, {n}")
    return math.isqrt(int(n))


def _bitlen(n: Number) -> int:
    if n < 0:
        raise ArithmeticFault(f"bitlen of a negative number, {n}")
    return int(n).bit_length()


def _real(name: str, function: Callable[[float], float]) -> Callable[[Number], float]:
    def apply(x: Number) -> float:
        try:
            return function(float(x))
        except ValueError:
            raise ArithmeticFault(f"{name} is not defined at {x}") from None
        except OverflowError:
            raise ArithmeticFault(f"{name} of {x} is too large for binary64") from None

    return apply


FUNCTIONS: dict[str, Callable[..., Number]] = {
    "neg": lambda a: -a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _div,
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": power,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
    "abs": abs,
    "min": lambda *a: min(a),
    "max": lambda *a: max(a),
    "clamp": _clamp,
    "floor": math.floor,
    "ceil": math.ceil,
    "isqrt": _isqrt,
    "bitlen": _bitlen,
    "bitand": lambda a, b: a & b,
    "bitor": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "power_of_two": lambda n: n > 0 and n & (n - 1) == 0,
    "sqrt": _real("sqrt", math.sqrt),
    "exp": _real("exp", math.exp),
    "log": _real("log", math.log),
    "log2": _real("log2", math.log2),
}
"""The strict operations by `program.Operation.op`; `and` and `or` are not strict."""


def apply(op: str, operands: tuple[Number, ...]) -> Number:
    """Return the value of a strict operation. Raises `ArithmeticFault` if it is undefined or out of range."""
    return checked(FUNCTIONS[op](*operands))
