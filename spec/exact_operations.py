"""The operators and functions of exact numbers, with one record for each.

A record is all that a new function of integers needs, besides its texts: the call in Triton
(`compiler.kernels.index_text`) and the call in torch (`runtime.executors.flex.torch_tape`). A test holds that both
tables have every operation of integers. Without more, arrays are computed one number at a time, and bounds are those of
an increasing function or none: `compiler.ir.integer_operations` and `compiler.analysis.box_values` may know better.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from attnc.spec.meaning.exact_arithmetic import ArithmeticFault, Number, checked, power

Operands = Literal["truths", "numbers", "exact", "integers"]
"""The demand on operands; `exact` numbers are not rounded."""

Result = Literal["bool", "int", "joined", "quotient", "power", "approximate"]
"""The type of a result: `joined` is the most general type of the operands, `approximate` a number in binary64."""

MOST_POWER = 64
"""Largest exponent for which the magnitude of a power is bounded."""


def _never(_: Sequence[bool]) -> bool:
    return False


def _always(_: Sequence[bool]) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class ExactOperation:
    """An operator or a function of exact numbers.

    `word`: the source text of an operator; empty for a function, which is called by its name. `variadic`: the last
    operand may be repeated. `evaluate`: the value; ArithmeticFault where it is undefined. `natural`: whether the result
    is surely never negative, given which operands are never negative. `of_naturals`: operands must not be negative.
    `is_increasing`: the result never falls where operands grow. `size`: a bound on the magnitude of the result, by
    bounds on those of the operands; None for no bound. `is_symmetric`: the order of operands does not matter. `noun`:
    the words for the operation in messages.
    """

    name: str
    parameters: tuple[str, ...]
    evaluate: Callable[..., Number]
    takes: Operands = "numbers"
    gives: Result = "joined"
    natural: Callable[[Sequence[bool]], bool] = _never
    word: str = ""
    variadic: bool = False
    of_naturals: bool = False
    is_increasing: bool = False
    size: Callable[..., int | None] = lambda *_: None
    is_symmetric: bool = False
    noun: str = "a function of many numbers"

    @property
    def is_natural(self) -> bool:
        """Whether the result is never negative, whatever the operands."""
        return self.natural((False,) * len(self.parameters))


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


def _operator(word: str, name: str, evaluate: Callable[..., Any], **more: Any) -> ExactOperation:
    return ExactOperation(name, ("a",) if name in ("neg", "not") else ("a", "b"), evaluate, word=word, **more)


def _comparison(word: str, name: str, evaluate: Callable[[Any, Any], bool]) -> ExactOperation:
    return _operator(word, name, evaluate, takes="exact", gives="bool")


def _junction(name: str, evaluate: Callable[[Sequence[Any]], bool]) -> ExactOperation:
    return ExactOperation(
        name, ("a", "b"), lambda *a: evaluate(a), takes="truths", gives="bool", word=name, variadic=True
    )


def _extreme(
    name: str, evaluate: Callable[[Sequence[Any]], Any], natural: Callable[[Sequence[bool]], bool]
) -> ExactOperation:
    return ExactOperation(
        name,
        ("a", "b"),
        lambda *a: evaluate(a),
        natural=natural,
        variadic=True,
        size=lambda *sizes: max(sizes),
        is_symmetric=True,
    )


def _on_bits(name: str, evaluate: Callable[[Any, Any], int]) -> ExactOperation:
    return ExactOperation(
        name,
        ("a", "b"),
        evaluate,
        takes="integers",
        gives="int",
        natural=all,
        size=lambda a, b: 2 * max(a, b),
        is_symmetric=True,
    )


def _on_naturals(name: str, evaluate: Callable[[int], int], noun: str) -> ExactOperation:
    """Return an increasing function of integers that are not negative, whose results are not negative either."""

    def checked_first(n: Number) -> int:
        if n < 0:
            raise ArithmeticFault(f"{name} of a negative number, {n}")
        return evaluate(int(n))

    return ExactOperation(
        name,
        ("n",),
        checked_first,
        takes="integers",
        gives="int",
        natural=_always,
        of_naturals=True,
        is_increasing=True,
        size=evaluate,
        noun=noun,
    )


def _in_binary64(
    name: str, evaluate: Callable[[float], float], natural: Callable[[Sequence[bool]], bool] = _never
) -> ExactOperation:
    def guarded(x: Number) -> float:
        try:
            return evaluate(float(x))
        except ValueError:
            raise ArithmeticFault(f"{name} is not defined at {x}") from None
        except OverflowError:
            raise ArithmeticFault(f"{name} of {x} is too large for binary64") from None

    return ExactOperation(name, ("x",), guarded, gives="approximate", natural=natural)


_OPERATORS = (
    _operator("-", "neg", operator.neg),
    _operator("+", "add", operator.add, natural=all),
    _operator("-", "sub", operator.sub),
    _operator("*", "mul", operator.mul, natural=all, size=lambda a, b: a * b, is_symmetric=True, noun="a product"),
    _operator("/", "div", _div, gives="quotient", natural=all),
    _operator("//", "floordiv", _floordiv, takes="exact", gives="int", natural=all, size=lambda a, b: a),
    _operator("%", "mod", _mod, takes="exact", natural=operator.itemgetter(1), size=lambda a, b: b),
    _operator(
        "**",
        "pow",
        power,
        gives="power",
        natural=operator.itemgetter(0),
        size=lambda a, b: int(max(a, 1) ** b) if b <= MOST_POWER else None,
        noun="a power",
    ),
    _comparison("<", "lt", operator.lt),
    _comparison("<=", "le", operator.le),
    _comparison(">", "gt", operator.gt),
    _comparison(">=", "ge", operator.ge),
    _comparison("==", "eq", operator.eq),
    _comparison("!=", "ne", operator.ne),
    _operator("not", "not", operator.not_, takes="truths", gives="bool"),
    _junction("and", all),
    _junction("or", any),
)

_FUNCTIONS = (
    ExactOperation("abs", ("x",), abs, natural=_always, size=lambda a: a),
    _extreme("min", min, all),
    _extreme("max", max, any),
    ExactOperation("clamp", ("x", "low", "high"), _clamp, natural=operator.itemgetter(1)),
    ExactOperation("floor", ("x",), math.floor, gives="int", natural=all),
    ExactOperation("ceil", ("x",), math.ceil, gives="int", natural=all),
    _on_naturals("isqrt", math.isqrt, "a square root"),
    _on_naturals("bitlen", int.bit_length, "a logarithm"),
    _on_bits("bitand", operator.and_),
    _on_bits("bitor", operator.or_),
    _on_bits("xor", operator.xor),
    ExactOperation("power_of_two", ("n",), lambda n: n > 0 and n & (n - 1) == 0, takes="integers", gives="bool"),
    _in_binary64("sqrt", math.sqrt, _always),
    _in_binary64("exp", math.exp, _always),
    _in_binary64("log", math.log),
    _in_binary64("log2", math.log2),
)

EXACT_FUNCTIONS: dict[str, ExactOperation] = {function.name: function for function in _FUNCTIONS}
"""Functions that a relation may call; those with results in binary64 only inside `floor` and `ceil`."""

EXACT_OPERATIONS: dict[str, ExactOperation] = {item.name: item for item in _OPERATORS} | EXACT_FUNCTIONS
"""All operators and functions of exact numbers by `program.Operation.op`. All but `and` and `or` are strict."""

COMPARISONS = frozenset(
    name for name, item in EXACT_OPERATIONS.items() if item.takes == "exact" and item.gives == "bool"
)

TRANSCENDENTAL = frozenset(name for name, item in EXACT_FUNCTIONS.items() if item.gives == "approximate")
"""Functions whose results are numbers in binary64."""


def apply(op: str, operands: tuple[Number, ...]) -> Number:
    """Return the value of a strict operation. Raises `ArithmeticFault` if it is undefined or out of range."""
    return checked(EXACT_OPERATIONS[op].evaluate(*operands))
