"""A stand-in for Triton on numpy arrays that evaluates single expressions: integers divide as in C."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Lanes:
    """Numbers of 64 or 32 bits, one per lane."""

    __array_ufunc__ = None

    def __init__(self, array: Any) -> None:
        self.array: Array = np.asarray(array)

    def to(self, kind: Any) -> Lanes:
        return Lanes(self.array.astype(kind))

    def __getitem__(self, where: Any) -> Lanes:
        return Lanes(self.array[where])

    def __neg__(self) -> Lanes:
        return Lanes(-self.array)

    def __invert__(self) -> Lanes:
        return Lanes(~self.array)


def _quotient(a: Array, b: Array) -> Array:
    """Divide integers, rounding towards zero."""
    calm = np.where(b == 0, 1, b)
    quotient = np.abs(a) // np.abs(calm)
    result: Array = np.where((a < 0) != (calm < 0), -quotient, quotient)
    return result


def _rest(a: Array, b: Array) -> Array:
    rest: Array = a - _quotient(a, b) * np.where(b == 0, 1, b)
    return rest


_OPERATIONS: Mapping[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "floordiv": _quotient, "mod": _rest,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "lshift": np.left_shift,
    "rshift": np.right_shift,
}  # fmt: skip
_COMPARISONS: Mapping[str, Callable[[Array, Array], Array]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def _operands(a: Any, b: Any) -> tuple[Array, Array]:
    """Convert Python's numbers to the type of the other operand, as Triton does."""
    arrays = [x.array if isinstance(x, Lanes) else x for x in (a, b)]
    kinds = [x.dtype for x in arrays if isinstance(x, np.ndarray)]
    kind = kinds[0] if len(kinds) == 1 else None
    if kind is not None and kind.kind != "b":
        arrays = [x if isinstance(x, np.ndarray) else _as_kind(x, kind) for x in arrays]
    left, right = (np.float32(x) if isinstance(x, float) else np.asarray(x) for x in arrays)
    return np.asarray(left), np.asarray(right)


def _as_kind(x: Any, kind: Any) -> Array:
    if kind.kind == "i" and isinstance(x, float):
        return np.asarray(x, dtype=np.float32)
    if kind == np.int32 and isinstance(x, int) and not -(1 << 31) <= x < 1 << 31:
        return np.asarray(x, dtype=np.int64)
    return np.asarray(x, dtype=kind)


def _method(of: Callable[[Array, Array], Array], swapped: bool = False) -> Callable[[Any, Any], Lanes]:
    def run(self: Lanes, other: Any) -> Lanes:
        a, b = _operands(other, self) if swapped else _operands(self, other)
        return Lanes(of(a, b))

    return run


for _name, _of in _OPERATIONS.items():
    setattr(Lanes, f"__{_name}__", _method(_of))
    setattr(Lanes, f"__r{_name}__", _method(_of, swapped=True))
for _name, _of in _COMPARISONS.items():
    setattr(Lanes, f"__{_name}__", _method(_of))


def _array(x: Any) -> Array:
    return x.array if isinstance(x, Lanes) else np.asarray(x)


def _where(test: Any, then: Any, otherwise: Any) -> Lanes:
    return Lanes(np.where(_array(test), *_operands(then, otherwise)))


def _two(of: Callable[[Array, Array], Array]) -> Callable[[Any, Any], Lanes]:
    return lambda a, b: Lanes(of(*_operands(a, b)))


def _one(of: Callable[[Array], Array]) -> Callable[[Any], Lanes]:
    return lambda x: Lanes(of(_array(x)))


def _sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result


LANGUAGE = SimpleNamespace(
    where=_where,
    maximum=_two(np.maximum),
    minimum=_two(np.minimum),
    abs=_one(np.abs),
    exp=_one(np.exp),
    exp2=_one(np.exp2),
    log=_one(np.log),
    log2=_one(np.log2),
    sqrt=_one(np.sqrt),
    sin=_one(np.sin),
    cos=_one(np.cos),
    erf=_one(np.vectorize(math.erf, otypes=[np.float32])),
    sigmoid=_one(_sigmoid),
    static_range=range,
    constexpr=lambda x: x,
    int32=np.int32,
    int64=np.int64,
    float32=np.float32,
)
"""The stand-in for `tl` in a text."""


def evaluate(text: str, names: Mapping[str, Any], helpers: Iterable[str]) -> Array:
    """Evaluate a text."""
    scope: dict[str, Any] = {"tl": LANGUAGE, "triton": SimpleNamespace(jit=lambda f: f), "FAR": 1 << 40}
    for helper in helpers:
        exec(helper, scope)
    with np.errstate(all="ignore"):
        result: Array = _array(eval(text, scope, {n: Lanes(x) for n, x in names.items()}))
    return result
