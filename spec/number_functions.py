"""The functions of numbers that scores, weights, values and steps may call, with one record for each.

A record is all that a new function needs, besides its texts: the call in Triton (`compiler.kernels.value_text`) and the
call in torch (`runtime.values.functions`). A test holds that both tables have every function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Sign = Literal["any", "natural", "positive"]
"""The sign of a result: `natural` means that it is at least 0."""


class FormulaBuilder(Protocol):
    """A builder of formulas: `f(op, *operands)`, whose operands are formulas or constants."""

    def __call__(self, op: str, *operands: Any) -> Any:
        """Return the formula of an operation."""


Slope = Callable[..., Any]
"""A function (formula builder, operands, result) → the derivative of the result by one operand."""


@dataclass(frozen=True, slots=True)
class NumberFunction:
    """A function of real numbers.

    `evaluate`: its value in binary64; ValueError where it is undefined. `slopes`: its derivative by each operand; none
    for functions with corners, whose derivatives are choices. `divisor`: a formula by which the slopes are divided.
    `sign`: the sign of its results. `is_finite`: whether results are finite where the operands are.
    `is_transcendental`: whether a processor takes about as long as for an exponential.
    """

    name: str
    parameters: tuple[str, ...]
    evaluate: Callable[..., float]
    slopes: tuple[Slope, ...] = ()
    divisor: Slope | None = None
    sign: Sign = "any"
    is_finite: bool = True
    is_transcendental: bool = True


def logaddexp(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b))."""
    larger, smaller = max(a, b), min(a, b)
    return larger if math.isinf(larger) else larger + math.log1p(math.exp(smaller - larger))


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _logarithm(x: float, logarithm: Callable[[float], float] = math.log) -> float:
    return -math.inf if x == 0 else logarithm(x)


def _unary(name: str, evaluate: Callable[[float], float], slope: Slope | None = None, **more: Any) -> NumberFunction:
    """Return a function of one number; `slope`: (formula builder, x, result) → the derivative."""
    return NumberFunction(name, ("x",), evaluate, () if slope is None else (slope,), **more)


_EXACT_TOO = (
    _unary("abs", abs, lambda f, x, y: f("sign", x), sign="natural", is_transcendental=False),
    _unary("sqrt", math.sqrt, lambda f, x, y: 0.5, divisor=lambda f, x, y: y, sign="natural", is_finite=False),
    _unary("exp", math.exp, lambda f, x, y: y, sign="positive", is_finite=False),
    _unary("log", _logarithm, lambda f, x, y: 1.0, divisor=lambda f, x, y: x, is_finite=False),
    _unary(
        "log2",
        lambda x: _logarithm(x, math.log2),
        lambda f, x, y: 1 / math.log(2),
        divisor=lambda f, x, y: x,
        is_finite=False,
    ),
)
"""Functions that relations may call too, on exact numbers."""

_ON_FLOATS = (
    _unary("tanh", math.tanh, lambda f, x, y: f("sub", 1.0, f("mul", y, y))),
    _unary("sigmoid", sigmoid, lambda f, x, y: f("mul", y, f("sigmoid", f("neg", x))), sign="positive"),
    _unary(
        "softplus",
        lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))),
        lambda f, x, y: f("sigmoid", x),
        sign="positive",
    ),
    _unary("relu", lambda x: max(x, 0.0), sign="natural", is_transcendental=False),
    _unary("elu", lambda x: x if x > 0 else math.expm1(x), lambda f, x, y: f("exp", f("min", x, 0.0))),
    _unary(
        "silu",
        lambda x: x * sigmoid(x) if x > -math.inf else -0.0,
        lambda f, x, y: f("mul", f("sigmoid", x), f("add", 1.0, f("mul", x, f("sigmoid", f("neg", x))))),
    ),
    _unary("sin", math.sin, lambda f, x, y: f("cos", x)),
    _unary("cos", math.cos, lambda f, x, y: f("neg", f("sin", x))),
    _unary("erf", math.erf, lambda f, x, y: f("mul", 2 / math.sqrt(math.pi), f("exp", f("neg", f("mul", x, x))))),
    NumberFunction(
        "logaddexp",
        ("a", "b"),
        logaddexp,
        (
            lambda f, a, b, y: f("sigmoid", f("sub", a, b)),
            lambda f, a, b, y: f("sigmoid", f("neg", f("sub", a, b))),
        ),
        is_finite=False,
        is_transcendental=False,
    ),
)

FLOAT_ALONE: dict[str, NumberFunction] = {function.name: function for function in _ON_FLOATS}
"""Functions that only scores, weights, values and steps may call."""

NUMBER_FUNCTIONS: dict[str, NumberFunction] = {function.name: function for function in _EXACT_TOO} | FLOAT_ALONE
"""All functions of numbers by name."""
