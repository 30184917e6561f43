"""Floating-point arithmetic in binary64, by the rules of IEEE 754: what overflows is inf, what has no value is NaN.

A vector is a tuple of floats; operations go entry by entry, a number with every entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from attnc.spec.meaning.exact import FUNCTIONS, ArithmeticFault, checked
from attnc.spec.names.builtins import FLOAT_BUILTINS, TRANSCENDENTAL
from attnc.spec.program import Value

Vector = tuple[float, ...]


def is_floating(op: str, values: Sequence[Value | float | Vector]) -> bool:
    """Whether an operation that may be floating point is: exact operands of an exact operation are kept exact."""
    if op in ("floor", "ceil"):
        return False
    if op in FLOAT_BUILTINS or op in TRANSCENDENTAL:
        return True
    if op == "pow" and not isinstance(values[1], int):
        return True
    return any(isinstance(value, float | tuple) for value in values)


def apply(op: str, values: Sequence[Value | float | Vector], *, floating: bool) -> Value | float | Vector:
    """The value of a strict operation. Raises ArithmeticFault where it is exact and has none."""
    if not (floating and is_floating(op, values)):
        return checked(FUNCTIONS[op](*map(_finite, values)))
    if op in _OF_VECTORS:
        return _OF_VECTORS[op](*values)
    return _entrywise(_FUNCTIONS[op], values)


def _finite(value: Value | float | Vector) -> Value | float | Vector:
    if isinstance(value, float) and not math.isfinite(value):
        raise ArithmeticFault("the number is not finite")
    return value


def total(op: str, values: Sequence[Value | float | Vector]) -> float | Vector:
    """`sum`, `mean`, `max` or `min` of values, at least one of which is floating point, or of none."""
    if not values:
        return {"max": -math.inf, "min": math.inf}.get(op, 0.0)
    if op in ("sum", "mean"):
        found: float | Vector = values[0]  # type: ignore[assignment]  # the checker let numbers through
        for value in values[1:]:
            found = _entrywise(lambda a, b: a + b, (found, value))
        return _entrywise(lambda a: a / len(values), (found,)) if op == "mean" else found
    return _entrywise(_FUNCTIONS[op], values)


def _entrywise(function: Callable[..., float], values: Sequence[Value | float | Vector]) -> float | Vector:
    width = next((len(value) for value in values if isinstance(value, tuple)), None)
    if width is None:
        return function(*map(_float, values))
    columns = [value if isinstance(value, tuple) else (value,) * width for value in values]
    return tuple(function(*map(_float, entries)) for entries in zip(*columns, strict=True))


def _float(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # numbers only
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def _guarded(function: Callable[..., float]) -> Callable[..., float]:
    """Overflow gives inf, an argument out of range NaN."""

    def guarded(*values: float) -> float:
        if any(math.isnan(value) for value in values):
            return math.nan
        try:
            return function(*values)
        except OverflowError:
            return math.inf
        except ValueError:
            return math.nan

    return guarded


def _div(a: float, b: float) -> float:
    if b:
        return a / b
    return math.nan if a == 0 else math.copysign(math.inf, a) * math.copysign(1, b)


def _pow(a: float, b: float) -> float:
    if a == 0 and b < 0:
        return math.inf
    result = a**b
    return math.nan if isinstance(result, complex) else result


def _log(x: float, of: Callable[[float], float] = math.log) -> float:
    return -math.inf if x == 0 else of(x)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def logaddexp(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    most, least = max(a, b), min(a, b)
    return most if math.isinf(most) else most + math.log1p(math.exp(least - most))


_PLAIN: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _div,
    "neg": lambda a: -a,
    "pow": _pow,
    "abs": abs,
    "min": lambda *a: min(a),
    "max": lambda *a: max(a),
    "clamp": lambda x, low, high: min(max(x, low), high),
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": _log,
    "log2": lambda x: _log(x, math.log2),
    "tanh": math.tanh,
    "sigmoid": _sigmoid,
    "softplus": lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))),
    "relu": lambda x: max(x, 0.0),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "silu": lambda x: x * _sigmoid(x) if x > -math.inf else -0.0,
    "sin": math.sin,
    "cos": math.cos,
    "logaddexp": logaddexp,
}
_FUNCTIONS = {name: _guarded(function) for name, function in _PLAIN.items()}


def _over(x: Vector, norm: float) -> Vector:
    return tuple(entry / norm for entry in x) if norm else x


_OF_VECTORS: dict[str, Callable[..., float | Vector]] = {
    "dot": lambda a, b: math.fsum(x * y for x, y in zip(a, b, strict=True)),
    "normalised": lambda x: _over(x, math.sqrt(math.fsum(e * e for e in x))),
    "rms": lambda x: _over(x, math.sqrt(math.fsum(e * e for e in x) / len(x))),
}
