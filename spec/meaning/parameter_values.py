"""Python values → values of parameters, by the parameter's type."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

from attnc.spec.meaning.exact_arithmetic import INT_MAX, INT_MIN, RATIONAL_BITS
from attnc.spec.program import Scalar, Value
from attnc.spec.types import Type


class Mismatch(ValueError):  # noqa: N818 (a fault of the caller's, not of ours)
    """A value that a parameter's type refuses; the message completes "expects"."""


def convert(value: object, type_: Type, lengths: tuple[int | None, ...]) -> Value:
    """The exact value, or `Mismatch`. `lengths` has an entry a dimension; None where any length will do.

    One number for a list of known length stands for every entry.
    """
    value = _plain(value)
    if not lengths:
        return _scalar(value, type_)
    length = lengths[0]
    if isinstance(value, list | tuple):
        if length is not None and len(value) != length:
            raise Mismatch(f"a list of {length}, and is given {len(value)}")
        if not value:
            raise Mismatch("a list with at least one entry")
        return tuple(convert(item, type_, lengths[1:]) for item in value)
    if length is None or isinstance(value, str):
        raise Mismatch(f"a list ({type_}), and is given {value!r}")
    return tuple(convert(value, type_, lengths[1:]) for _ in range(length))


def _plain(value: object) -> object:
    """numpy's and torch's scalars and arrays as Python's own."""
    if isinstance(value, bool | int | float | Fraction | Decimal | str | list | tuple | None):
        return value
    for method in ("tolist", "item", "__index__"):
        if hasattr(value, method):
            plain: object = getattr(value, method)()
            return plain
    return value


def _scalar(value: object, type_: Type) -> Scalar:
    match type_.kind, value:
        case "bool", bool():
            return value
        case "int", int() if not isinstance(value, bool):
            return _in_range(value)
        case "real", int() | float() | Fraction() | Decimal() if not isinstance(value, bool):
            return _refined(_rational(value), type_)
    wanted = {"bool": "true or false", "int": "an integer", "real": "a number"}.get(type_.kind, str(type_))
    raise Mismatch(f"{wanted}, and is given {_shown(value)}")


def _in_range(value: int) -> int:
    if not INT_MIN <= value <= INT_MAX:
        raise Mismatch(f"an integer of 64 bits, and is given one of {value.bit_length()}")
    return value


def _rational(value: int | float | Fraction | Decimal) -> Fraction:
    finite = (
        value.is_finite() if isinstance(value, Decimal) else math.isfinite(value) if isinstance(value, float) else True
    )
    if not finite:
        raise Mismatch(f"a finite number, and is given {value}")
    if isinstance(value, Decimal) and abs(value.adjusted()) > RATIONAL_BITS:
        raise Mismatch(f"a number of ordinary size, and is given {value}")
    exact = Fraction(repr(float(value))) if isinstance(value, float) else Fraction(value)
    if max(exact.numerator.bit_length(), exact.denominator.bit_length()) > RATIONAL_BITS:
        raise Mismatch(f"a fraction of at most {RATIONAL_BITS} bits")
    return exact


def _refined(value: Fraction, type_: Type) -> Fraction:
    match type_.refinement:
        case "unit" if not 0 <= value <= 1:
            raise Mismatch(f"a number from 0 to 1, and is given {shown(value)}")
        case "positive" if value <= 0:
            raise Mismatch(f"a number above 0, and is given {shown(value)}")
        case "log_decay" if value > 0:
            raise Mismatch(f"a number of at most 0, and is given {shown(value)}")
    return value


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int | Fraction) else shown(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown(value: Value) -> str:
    """A value as it is written in `.attn`."""
    match value:
        case bool():
            return "true" if value else "false"
        case tuple():
            return f"[{', '.join(shown(v) for v in value)}]"
        case Fraction():
            return _fraction(value)
        case int():
            return str(value) if abs(value) <= INT_MAX else f"an integer of {value.bit_length()} bits"


def _fraction(value: Fraction) -> str:
    decimal = f"{float(value)!r}" if abs(value) < 10**15 else ""
    if decimal and Fraction(decimal) == value:
        return decimal.removesuffix(".0")
    return f"{value.numerator}/{value.denominator}"
