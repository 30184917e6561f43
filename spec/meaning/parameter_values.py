"""Convert Python values to values of parameters, and evaluate expressions that read only parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import cast

from attnc.spec import program
from attnc.spec.errors import EvaluationError
from attnc.spec.meaning.denotation import EvaluationContext, EvaluationFrame, Meanings, Result
from attnc.spec.meaning.exact_arithmetic import INT_MAX, INT_MIN, RATIONAL_BITS
from attnc.spec.program import BoundProgram, Scalar, Value
from attnc.spec.source import Span
from attnc.spec.types import Type

MAX_CONSTANT_STEPS = 100_000
"""Maximum number of steps for an expression that reads only parameters."""


class _ParametersAlone:
    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._steps = 0

    def size(self, name: str, span: Span) -> int:
        return self._sizes[name]

    def tick(self, span: Span) -> None:
        self._steps += 1
        check_steps(self._steps, MAX_CONSTANT_STEPS, span)


def parameters_alone(sizes: Mapping[str, int]) -> EvaluationContext:
    """Return a context that knows parameters and some sizes; reading anything else raises AttributeError."""
    return cast("EvaluationContext", _ParametersAlone(sizes))


def check_steps(steps: int, limit: int, span: Span) -> None:
    """Raise EvaluationError where more steps were taken than the limit allows."""
    if steps > limit:
        raise EvaluationError("A908", f"this takes more than {limit} steps", span, "make the ranges shorter")


def constant_value(bound: BoundProgram, node: program.Expr) -> Result:
    """Return the value of an expression that reads only parameters. Raises `EvaluationError` if it is undefined."""
    return Meanings(bound.program, bound.values).of(node)(EvaluationFrame(parameters_alone(bound.lengths), {}, 0, 0))


class Mismatch(ValueError):  # noqa: N818 (an error of the caller)
    """Raised for a value that does not fit a parameter's type; the message completes "expects …"."""


def convert(value: object, type_: Type, lengths: tuple[int | None, ...]) -> Value:
    """Return the exact value. Raises `Mismatch` for a value that does not fit the type.

    `lengths` has one entry per dimension, None where any length is allowed. A single number for a list of known length
    is repeated for every entry.
    """
    value = _plain(value)
    if not lengths:
        return _scalar(value, type_)
    length = lengths[0]
    if isinstance(value, list | tuple):
        if length is not None and len(value) != length:
            raise Mismatch(f"a list of {length}, got {len(value)}")
        if not value:
            raise Mismatch("a list with at least one entry")
        return tuple(convert(item, type_, lengths[1:]) for item in value)
    if length is None or isinstance(value, str):
        raise Mismatch(f"a list ({type_}), got {value!r}")
    return tuple(convert(value, type_, lengths[1:]) for _ in range(length))


def _plain(value: object) -> object:
    """Return scalars and arrays of numpy and torch as Python numbers and lists."""
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
    expected = {"bool": "true or false", "int": "an integer", "real": "a number"}.get(type_.kind, str(type_))
    raise Mismatch(f"{expected}, got {_shown(value)}")


def _in_range(value: int) -> int:
    if not INT_MIN <= value <= INT_MAX:
        raise Mismatch(f"an integer of 64 bits, got one of {value.bit_length()} bits")
    return value


def _rational(value: int | float | Fraction | Decimal) -> Fraction:
    finite = (
        value.is_finite() if isinstance(value, Decimal) else math.isfinite(value) if isinstance(value, float) else True
    )
    if not finite:
        raise Mismatch(f"a finite number, got {value}")
    if isinstance(value, Decimal) and abs(value.adjusted()) > RATIONAL_BITS:
        raise Mismatch(f"a number from 1e-{RATIONAL_BITS} to 1e{RATIONAL_BITS} in size, got {value}")
    exact = Fraction(repr(float(value))) if isinstance(value, float) else Fraction(value)
    if max(exact.numerator.bit_length(), exact.denominator.bit_length()) > RATIONAL_BITS:
        raise Mismatch(f"a fraction of at most {RATIONAL_BITS} bits")
    return exact


def _refined(value: Fraction, type_: Type) -> Fraction:
    match type_.refinement:
        case "unit" if not 0 <= value <= 1:
            raise Mismatch(f"a number from 0 to 1, got {shown(value)}")
        case "positive" if value <= 0:
            raise Mismatch(f"a number above 0, got {shown(value)}")
        case "log_decay" if value > 0:
            raise Mismatch(f"a number of at most 0, got {shown(value)}")
    return value


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int | Fraction) else shown(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown(value: Value) -> str:
    """Return a value in the notation of `.attn`."""
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
