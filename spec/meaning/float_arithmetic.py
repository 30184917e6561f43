"""Floating-point arithmetic in binary64 by IEEE 754: an overflow gives inf, an undefined result NaN.

A vector is a tuple of floats; operations are elementwise, and numbers are broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attnc.spec.exact_operations import COMPARISONS, EXACT_OPERATIONS, TRANSCENDENTAL
from attnc.spec.meaning.exact_arithmetic import ArithmeticFault, checked
from attnc.spec.names.builtins import FLOAT_BUILTINS
from attnc.spec.number_functions import NUMBER_FUNCTIONS
from attnc.spec.program import Value


@dataclass(frozen=True, slots=True)
class ScaledFloat:
    """The number `mantissa * exp(shift)` beyond the range of binary64; keeps quotients of exponentials finite."""

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
"""The entries of a vector, or the rows of a matrix."""

LARGEST = 600.0
"""Exponentials of arguments with a larger absolute value are kept as `ScaledFloat`."""


def is_floating(op: str, values: Sequence[Value | float | Vector]) -> bool:
    """Whether an operation on these values is floating point; an exact operation on exact values stays exact."""
    if op in ("floor", "ceil"):
        return False
    if op in FLOAT_BUILTINS or op in TRANSCENDENTAL:
        return True
    if op == "pow" and not (isinstance(values[0], int) and isinstance(values[1], int)):
        return True
    return op == "share" or any(isinstance(value, float | tuple | ScaledFloat) for value in values)


def apply(op: str, values: Sequence[Value | float | Vector], *, floating: bool) -> Any:
    """Return the value of a strict operation. Raises `ArithmeticFault` for an exact operation that is undefined.

    With `floating`, sums and products of exact numbers that are out of range are rounded.
    """
    if not (floating and is_floating(op, values)):
        result = EXACT_OPERATIONS[op].evaluate(*map(_finite, values))
        try:
            return checked(result)
        except ArithmeticFault:
            if floating and op in _ROUNDED:
                return float(result)
            raise
    if op in COMPARISONS:
        return EXACT_OPERATIONS[op].evaluate(*map(_float, values))
    if op in _VECTOR_FUNCTIONS:
        return _VECTOR_FUNCTIONS[op](*values)
    if op in _SCALED:
        return _entrywise(lambda *entries: _scaled(op, entries), values)
    return _entrywise(lambda *entries: _FUNCTIONS[op](*map(_float, entries)), values)


_ROUNDED = frozenset({"add", "sub", "mul", "div", "neg"})

_SCALED = frozenset({"add", "sub", "mul", "div", "share", "neg", "exp", "log"})
"""Operations that accept and return `ScaledFloat`."""


def _scaled(op: str, entries: tuple[Any, ...]) -> float | ScaledFloat:
    if op == "exp":
        x = _float(entries[0])
        return ScaledFloat(1.0, x) if LARGEST < abs(x) < math.inf else _FUNCTIONS["exp"](x)
    if not any(isinstance(entry, ScaledFloat) for entry in entries):
        return _FUNCTIONS[op](*map(_float, entries))
    first, *operands = (
        entry if isinstance(entry, ScaledFloat) else ScaledFloat(_float(entry), 0.0) for entry in entries
    )
    match op:
        case "log":
            return _FUNCTIONS["log"](first.mantissa) + first.shift
        case "neg":
            return -first
        case "add":
            return first + operands[0]
        case "sub":
            return first + -operands[0]
        case "mul":
            return first * operands[0]
        case "share" if not first.mantissa and not operands[0].mantissa:
            return 0.0
        case _:
            return _unscaled(first / operands[0])


def _unscaled(value: ScaledFloat) -> float | ScaledFloat:
    return float(value) if abs(value.shift) <= LARGEST else value


def _finite(value: Value | float | Vector) -> Value | float | Vector:
    if isinstance(value, float) and not math.isfinite(value):
        raise ArithmeticFault("the number is not finite")
    return value


def total(op: str, values: Sequence[Value | float | Vector]) -> Any:
    """Return the floating-point `sum`, `mean`, `max` or `min` of values; defined for no values, too."""
    if not values:
        return {"max": -math.inf, "min": math.inf}.get(op, 0.0)
    if op in ("sum", "mean"):
        result: Any = values[0]
        for value in values[1:]:
            result = apply("add", (result, value), floating=True)
        return apply("mul", (result, 1 / len(values)), floating=True) if op == "mean" else result
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
        return float(value)  # type: ignore[arg-type]  # only numbers get here
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def _guarded(function: Callable[..., float]) -> Callable[..., float]:
    """Return `function` extended by IEEE 754: an overflow gives inf, an argument out of range NaN."""

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


def logsumexp(values: Sequence[float]) -> float:
    """Return log(Σ exp(x)); -inf for no values."""
    largest = max(values, default=-math.inf)
    return largest if math.isinf(largest) else largest + math.log(math.fsum(math.exp(x - largest) for x in values))


_PLAIN: dict[str, Callable[..., Any]] = {
    **{name: EXACT_OPERATIONS[name].evaluate for name in ("neg", "add", "sub", "mul", "min", "max")},
    "div": _div,
    "share": lambda a, b: 0.0 if a == 0 and b == 0 else _div(a, b),
    "pow": _pow,
    "real": lambda x: x,
    "imag": lambda x: 0.0,
    "conj": lambda x: x,
    "clamp": lambda x, low, high: min(max(x, low), high),
    **{name: function.evaluate for name, function in NUMBER_FUNCTIONS.items()},
}
_FUNCTIONS = {name: _guarded(function) for name, function in _PLAIN.items()}


def _divided(x: Vector, norm: float) -> Vector:
    return tuple(entry / norm for entry in x) if norm else x


def _solve(matrix: tuple[Vector, ...], vector: Vector, steps: int | None = None) -> Vector:
    """Solve by Gaussian elimination with pivots; with `steps`, by that many steps of conjugate gradients."""
    if steps is not None:
        return _conjugate_gradients(matrix, vector, steps)
    rows = [[*map(float, row), float(x)] for row, x in zip(matrix, vector, strict=True)]
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, n):
            factor = _div(rows[r][i], rows[i][i])
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    solution = [0.0] * n
    for i in reversed(range(n)):
        solution[i] = _div(rows[i][n] - math.fsum(rows[i][j] * solution[j] for j in range(i + 1, n)), rows[i][i])
    return tuple(solution)


EPSILON, TINY = 2.0**-52, 2.0**-1022


def _conjugate_gradients(matrix: tuple[Vector, ...], vector: Vector, steps: int) -> Vector:
    """Return the result of conjugate gradients from 0 (Hestenes and Stiefel 1952); stops when the residual vanishes."""
    solution, residual = [0.0] * len(vector), [float(x) for x in vector]
    direction, residual_norm = list(residual), math.fsum(x * x for x in residual)
    smallest_norm = max(residual_norm * EPSILON**2, TINY)
    for _ in range(steps):
        product = [math.fsum(float(a) * d for a, d in zip(row, direction, strict=True)) for row in matrix]
        curvature = math.fsum(d * a for d, a in zip(direction, product, strict=True))
        if not (residual_norm > smallest_norm and curvature):
            break
        step = residual_norm / curvature
        solution = [x + step * d for x, d in zip(solution, direction, strict=True)]
        residual = [r - step * a for r, a in zip(residual, product, strict=True)]
        next_norm = math.fsum(r * r for r in residual)
        ratio, residual_norm = next_norm / residual_norm, next_norm
        direction = [r + ratio * d for r, d in zip(residual, direction, strict=True)]
    return tuple(solution)


def _part(x: Vector, index: int, parts: int) -> Vector:
    if len(x) % parts:
        raise ArithmeticFault(f"a vector of {len(x)} entries has no {parts} equal parts")
    size = len(x) // parts
    return x[index * size : (index + 1) * size]


def _zero_if_empty(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gives 0 where an operand is an empty sum of vectors, the number 0."""
    return lambda *values: function(*values) if all(isinstance(x, tuple) for x in values) else 0.0


_VECTOR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dot": _zero_if_empty(lambda a, b: math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))),
    "normalised": _zero_if_empty(lambda x: _divided(x, math.sqrt(math.fsum(e * e for e in x)))),
    "rms": _zero_if_empty(lambda x: _divided(x, math.sqrt(math.fsum(e * e for e in x) / len(x)))),
    "part": lambda x, number, of: _part(x, number, of) if isinstance(x, tuple) else 0.0,
    "outer": lambda a, b: tuple(tuple(float(x) * float(y) for y in b) for x in a),
    "eye": lambda n: tuple(tuple(float(i == j) for j in range(n)) for i in range(n)),
    "solve": _solve,
}
