"""Floating-point arithmetic in binary64, by the rules of IEEE 754: what overflows is inf, what has no value is NaN.

A vector is a tuple of floats; operations go entry by entry, a number with every entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attnc.spec.meaning.exact_arithmetic import FUNCTIONS, ArithmeticFault, checked
from attnc.spec.names.builtins import FLOAT_BUILTINS, TRANSCENDENTAL
from attnc.spec.program import Value


@dataclass(frozen=True, slots=True)
class ScaledFloat:
    """`mantissa * exp(shift)`: what binary64 cannot hold, so that quotients of large exponentials keep their value."""

    mantissa: float
    shift: float

    def __float__(self) -> float:
        try:
            return self.mantissa * math.exp(self.shift) if self.mantissa else 0.0
        except OverflowError:
            return math.copysign(math.inf, self.mantissa)

    def __neg__(self) -> ScaledFloat:
        return ScaledFloat(-self.mantissa, self.shift)

    def __mul__(self, other: ScaledFloat) -> ScaledFloat:
        return ScaledFloat(self.mantissa * other.mantissa, self.shift + other.shift)

    def __truediv__(self, other: ScaledFloat) -> ScaledFloat:
        return ScaledFloat(_div(self.mantissa, other.mantissa), self.shift - other.shift)

    def __add__(self, other: ScaledFloat) -> ScaledFloat:
        a, b = (self, other) if self.shift >= other.shift else (other, self)
        if not a.mantissa:
            return b
        return ScaledFloat(a.mantissa + b.mantissa * math.exp(b.shift - a.shift), a.shift)


Vector = tuple[Any, ...]
"""Numbers, or rows of a matrix."""

LARGEST = 600.0
"""Exponentials of more than this, or less than minus this, are kept as `ScaledFloat`."""


def is_floating(op: str, values: Sequence[Value | float | Vector]) -> bool:
    """Whether an operation that may be floating point is: exact operands of an exact operation are kept exact."""
    if op in ("floor", "ceil"):
        return False
    if op in FLOAT_BUILTINS or op in TRANSCENDENTAL:
        return True
    if op == "pow" and not (isinstance(values[0], int) and isinstance(values[1], int)):
        return True
    return op == "share" or any(isinstance(value, float | tuple | ScaledFloat) for value in values)


def apply(op: str, values: Sequence[Value | float | Vector], *, floating: bool) -> Any:
    """The value of a strict operation. Raises ArithmeticFault where it is exact and has none.

    Where it may be floating point, sums and products of exact numbers that are out of range are rounded.
    """
    if not (floating and is_floating(op, values)):
        result = FUNCTIONS[op](*map(_finite, values))
        try:
            return checked(result)
        except ArithmeticFault:
            if floating and op in _ROUNDED:
                return float(result)
            raise
    if op in _COMPARED:
        return FUNCTIONS[op](*map(_float, values))
    if op in _OF_VECTORS:
        return _OF_VECTORS[op](*values)
    if op in _SCALED:
        return _entrywise(lambda *entries: _scaled(op, entries), values)
    return _entrywise(lambda *entries: _FUNCTIONS[op](*map(_float, entries)), values)


_COMPARED = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})

_ROUNDED = frozenset({"add", "sub", "mul", "div", "neg"})

_SCALED = frozenset({"add", "sub", "mul", "div", "share", "neg", "exp", "log"})
"""Operations that keep what binary64 cannot hold."""


def _scaled(op: str, entries: tuple[Any, ...]) -> float | ScaledFloat:
    if op == "exp":
        x = _float(entries[0])
        return ScaledFloat(1.0, x) if LARGEST < abs(x) < math.inf else _FUNCTIONS["exp"](x)
    if not any(isinstance(entry, ScaledFloat) for entry in entries):
        return _FUNCTIONS[op](*map(_float, entries))
    a, *rest = (entry if isinstance(entry, ScaledFloat) else ScaledFloat(_float(entry), 0.0) for entry in entries)
    match op:
        case "log":
            return _FUNCTIONS["log"](a.mantissa) + a.shift
        case "neg":
            return -a
        case "add":
            return a + rest[0]
        case "sub":
            return a + -rest[0]
        case "mul":
            return a * rest[0]
        case "share" if not a.mantissa and not rest[0].mantissa:
            return 0.0
        case _:
            return _unscaled(a / rest[0])


def _unscaled(value: ScaledFloat) -> float | ScaledFloat:
    return float(value) if abs(value.shift) <= LARGEST else value


def _finite(value: Value | float | Vector) -> Value | float | Vector:
    if isinstance(value, float) and not math.isfinite(value):
        raise ArithmeticFault("the number is not finite")
    return value


def total(op: str, values: Sequence[Value | float | Vector]) -> Any:
    """`sum`, `mean`, `max` or `min` of values, at least one of which is floating point, or of none."""
    if not values:
        return {"max": -math.inf, "min": math.inf}.get(op, 0.0)
    if op in ("sum", "mean"):
        found: Any = values[0]
        for value in values[1:]:
            found = apply("add", (found, value), floating=True)
        return apply("mul", (found, 1 / len(values)), floating=True) if op == "mean" else found
    return _entrywise(lambda *entries: _FUNCTIONS[op](*map(_float, entries)), values)


def _entrywise(function: Callable[..., Any], values: Sequence[Any]) -> Any:
    """Apply a function entry by entry to numbers, vectors and matrices; numbers are broadcast."""
    width = next((len(value) for value in values if isinstance(value, tuple)), None)
    if width is None:
        return function(*values)
    columns = [value if isinstance(value, tuple) else (value,) * width for value in values]
    return tuple(_entrywise(function, entries) for entries in zip(*columns, strict=True))


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


def logsumexp(values: Sequence[float]) -> float:
    """log(Σ exp(x)), of nothing -inf."""
    most = max(values, default=-math.inf)
    return most if math.isinf(most) else most + math.log(math.fsum(math.exp(x - most) for x in values))


_PLAIN: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _div,
    "share": lambda a, b: 0.0 if a == 0 and b == 0 else _div(a, b),
    "neg": lambda a: -a,
    "pow": _pow,
    "real": lambda x: x,
    "imag": lambda x: 0.0,
    "conj": lambda x: x,
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


def _solve(matrix: tuple[Vector, ...], vector: Vector, steps: int | None = None) -> Vector:
    """Gaussian elimination with pivots, or some steps of conjugate gradients."""
    if steps is not None:
        return _descended(matrix, vector, steps)
    rows = [[*map(float, row), float(x)] for row, x in zip(matrix, vector, strict=True)]
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, n):
            factor = _div(rows[r][i], rows[i][i])
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    found = [0.0] * n
    for i in reversed(range(n)):
        found[i] = _div(rows[i][n] - math.fsum(rows[i][j] * found[j] for j in range(i + 1, n)), rows[i][i])
    return tuple(found)


EPSILON, TINY = 2.0**-52, 2.0**-1022


def _descended(matrix: tuple[Vector, ...], vector: Vector, steps: int) -> Vector:
    """Steps of conjugate gradients from 0 (Hestenes and Stiefel 1952), as long as there is something left."""
    found, rest = [0.0] * len(vector), [float(x) for x in vector]
    direction, size = list(rest), math.fsum(x * x for x in rest)
    least = max(size * EPSILON**2, TINY)
    for _ in range(steps):
        ahead = [math.fsum(float(a) * d for a, d in zip(row, direction, strict=True)) for row in matrix]
        curve = math.fsum(d * a for d, a in zip(direction, ahead, strict=True))
        if not (size > least and curve):
            break
        step = size / curve
        found = [x + step * d for x, d in zip(found, direction, strict=True)]
        rest = [r - step * a for r, a in zip(rest, ahead, strict=True)]
        smaller = math.fsum(r * r for r in rest)
        turn, size = smaller / size, smaller
        direction = [r + turn * d for r, d in zip(rest, direction, strict=True)]
    return tuple(found)


def _part(x: Vector, number: int, of: int) -> Vector:
    if len(x) % of:
        raise ArithmeticFault(f"a vector of {len(x)} entries has no {of} equal parts")
    size = len(x) // of
    return x[number * size : (number + 1) * size]


def _of_some(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gives 0 where an operand is an empty sum of vectors, the number 0."""
    return lambda *values: function(*values) if all(isinstance(x, tuple) for x in values) else 0.0


_OF_VECTORS: dict[str, Callable[..., Any]] = {
    "dot": _of_some(lambda a, b: math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))),
    "normalised": _of_some(lambda x: _over(x, math.sqrt(math.fsum(e * e for e in x)))),
    "rms": _of_some(lambda x: _over(x, math.sqrt(math.fsum(e * e for e in x) / len(x)))),
    "part": lambda x, number, of: _part(x, number, of) if isinstance(x, tuple) else 0.0,
    "outer": lambda a, b: tuple(tuple(float(x) * float(y) for y in b) for x in a),
    "eye": lambda n: tuple(tuple(float(i == j) for j in range(n)) for i in range(n)),
    "solve": _solve,
}
