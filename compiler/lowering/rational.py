"""Exact rationals as pairs of integer nodes, so that the IR holds integers only."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from attnc.compiler.ir import Arith, Const, Extent, Index, Linear, Position, fold
from attnc.spec.exact_operations import EXACT_OPERATIONS


@dataclass(frozen=True, slots=True)
class Rational:
    """The fraction `num / den`; `den` is positive wherever the value is read."""

    num: Index
    den: Index


Number = Index | Rational


def from_fraction(value: Fraction) -> Number:
    """Return a constant as an integer or a rational."""
    if value.denominator == 1:
        return fold.const(value.numerator)
    return Rational(fold.const(value.numerator), fold.const(value.denominator))


def num(x: Number) -> Index:
    """The numerator of a number."""
    return x.num if isinstance(x, Rational) else x


def den(x: Number) -> Index:
    """The denominator of a number; 1 for an integer."""
    return x.den if isinstance(x, Rational) else fold.const(1)


def _ratio(n: Index, d: Index) -> Number:
    return n if isinstance(d, Const) and d.value == 1 else Rational(n, d)


def _aligned(a: Number, b: Number) -> tuple[Index, Index, Index]:
    """The numerators of a and b over a common denominator, and that denominator."""
    if den(a) is den(b):
        return num(a), num(b), den(a)
    return fold.mul(num(a), den(b)), fold.mul(num(b), den(a)), fold.mul(den(a), den(b))


def add(a: Number, b: Number) -> Number:
    """Return `a + b`."""
    x, y, d = _aligned(a, b)
    return _ratio(fold.add(x, y), d)


def neg(a: Number) -> Number:
    """Return `-a`."""
    return _ratio(fold.times(num(a), -1), den(a))


def sub(a: Number, b: Number) -> Number:
    """Return `a - b`."""
    return add(a, neg(b))


def mul(a: Number, b: Number) -> Number:
    """Return `a * b`."""
    return _ratio(fold.mul(num(a), num(b)), fold.mul(den(a), den(b)))


def div(a: Number, b: Number) -> Number:
    """Exact division; a zero divisor is a fault where the value is read."""
    top, bottom = fold.mul(num(a), den(b)), fold.mul(den(a), num(b))
    if isinstance(bottom, Const) and bottom.value > 0:
        reduced = _reduced(top, bottom.value)
        return reduced if reduced is not None else Rational(top, bottom)
    if _never_negative(bottom):
        return Rational(top, bottom)
    negative = fold.less(bottom, fold.const(0))
    return Rational(fold.choice(negative, fold.times(top, -1), top), fold.absolute(bottom))


def _never_negative(node: Index) -> bool:
    """Whether the form of an expression proves that its value is at least 0."""
    match node:
        case Const(value=value):
            return value >= 0
        case Position() | Extent():
            return True
        case Linear():
            return node.constant >= 0 and all(c >= 0 and _never_negative(t) for t, c in node.terms)
        case Arith(op=op) if EXACT_OPERATIONS[op].is_natural:
            return True
        case Arith(op="max"):
            return any(map(_never_negative, node.operands))
        case Arith(op="mul" | "min" | "floordiv" | "bitand" | "bitor"):
            return all(map(_never_negative, node.operands))
        case Arith(op="pow"):
            return _never_negative(node.operands[0])
        case _:
            return False


def _reduced(top: Index, bottom: int) -> Number | None:
    return from_fraction(Fraction(top.value, bottom)) if isinstance(top, Const) else None


def floor(a: Number) -> Index:
    """Return the largest integer not above a."""
    return fold.floordiv(num(a), den(a)) if isinstance(a, Rational) else a


def ceil(a: Number) -> Index:
    """Return the smallest integer not below a."""
    return fold.times(floor(neg(a)), -1)


def floordiv(a: Number, b: Number) -> Index:
    """Return `a // b`, an integer."""
    if isinstance(a, Rational) or isinstance(b, Rational):
        return floor(div(a, b))
    return fold.floordiv(a, b)


def mod(a: Number, b: Number) -> Number:
    """Return `a % b`, with the sign of b."""
    if isinstance(a, Rational) or isinstance(b, Rational):
        return sub(a, mul(b, floordiv(a, b)))
    return fold.mod(a, b)


def power(a: Number, e: Index) -> Number:
    """Return `a ** e` for an integer e of either sign."""
    if isinstance(e, Const):
        if e.value >= 0:
            return _ratio(fold.power(num(a), e), fold.power(den(a), e))
        return div(fold.const(1), power(a, fold.const(-e.value)))
    up, down = fold.maximum(e, fold.const(0)), fold.maximum(fold.times(e, -1), fold.const(0))
    top = fold.mul(fold.power(num(a), up), fold.power(den(a), down))
    bottom = fold.mul(fold.power(den(a), up), fold.power(num(a), down))
    return div(top, bottom)


def absolute(a: Number) -> Number:
    """The absolute value of a number."""
    return _ratio(fold.absolute(num(a)), den(a))


def choice(condition: Index, a: Number, b: Number) -> Number:
    """Return `a if condition else b`."""
    if not isinstance(a, Rational) and not isinstance(b, Rational):
        return fold.choice(condition, a, b)
    return _ratio(fold.choice(condition, num(a), num(b)), fold.choice(condition, den(a), den(b)))


def minimum(a: Number, b: Number) -> Number:
    """The smaller of two numbers."""
    if not isinstance(a, Rational) and not isinstance(b, Rational):
        return fold.minimum(a, b)
    return choice(less_equal(a, b), a, b)


def maximum(a: Number, b: Number) -> Number:
    """The larger of two numbers."""
    if not isinstance(a, Rational) and not isinstance(b, Rational):
        return fold.maximum(a, b)
    return choice(less_equal(b, a), a, b)


def less_equal(a: Number, b: Number) -> Index:
    """The condition `a <= b`, over integers."""
    x, y, _ = _aligned(a, b)
    return fold.less_equal(x, y)


def less(a: Number, b: Number) -> Index:
    """The condition `a < b`, over integers."""
    x, y, _ = _aligned(a, b)
    return fold.less(x, y)


def equal(a: Number, b: Number) -> Index:
    """The condition `a == b`, over integers; a and b may also be two truth values."""
    x, y, _ = _aligned(a, b)
    return fold.equal(x, y)
