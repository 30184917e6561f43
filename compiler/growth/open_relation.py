"""The relation of one head with its length left open: `keys`, the number of tokens, is the only size that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

from attnc.compiler.ir import Arith, Compare, Const, Extent, HeadIndex, Index, Linear, Position, RoundToInt, fold
from attnc.compiler.ir.rewrite import rewrite, walk
from attnc.compiler.ir.verify_ir import checked, verified
from attnc.compiler.lowering.float_tables import tabulated

MOST_QUOTIENTS = 16
"""Maximum value of a quotient by a fraction of the length."""


@dataclass(frozen=True, slots=True)
class OpenRelation:
    """A relation over positions q and k of n tokens, where n is `Extent("keys")`.

    `simple`: an equal relation, from n = `start` on, in which quotients by fractions of n are written as conditions.
    """

    visible: Index
    simple: Index
    start: int

    @property
    def reads_length(self) -> bool:
        """Whether the relation reads n, so that the pairs visible at one length may not be visible at another."""
        return any(isinstance(node, Extent | RoundToInt) for node in walk(self.visible))

    def at(self, n: int) -> Index:
        """Return the relation over n tokens."""
        return at_length(self.visible, n)


def open_relation(relation: Index, sizes: Mapping[str, Index], head: int, group: int) -> OpenRelation:
    """Return the relation of a head, with all sizes except the length replaced by `sizes`."""

    def change(node: Index) -> Index | None:
        match node:
            case Extent(name=name):
                return fold.extent("keys") if name == "queries" else sizes.get(name)
            case HeadIndex(name=name):
                return fold.const({"head": head, "kv_head": head // group, "batch": 0}[name])
            case _:
                return None

    visible = checked(rewrite(rewrite(relation, change), _reduced))
    spelling = _Spelling()
    simple = checked(rewrite(visible, spelling.change))
    return OpenRelation(simple if spelling.start == 1 else visible, simple, spelling.start)


@verified
def at_length(relation: Index, n: int) -> Index:
    """Return a relation, condition or integer with its length set to n tokens."""
    if not any(isinstance(node, Extent | RoundToInt) for node in walk(relation)):
        return relation
    keys = fold.const(n)

    def change(node: Index) -> Index | None:
        if isinstance(node, RoundToInt):
            return tabulated(node, n, n)
        return keys if isinstance(node, Extent) else None

    return rewrite(relation, change)


def integer_at(node: Index, n: int) -> int:
    """Return the value at n tokens of an integer that reads no more than the length."""
    value = at_length(node, n)
    assert isinstance(value, Const)
    return value.value


def _reduced(node: Index) -> Index | None:
    """Rewrite `(g·x + c) // (g·d)` to `(x + c // g) // d`."""
    if not (isinstance(node, Arith) and node.op == "floordiv"):
        return None
    value, divisor = node.operands
    if not isinstance(divisor, Const) or divisor.value <= 0:
        return None
    terms, constant = fold.parts(value)
    common = gcd(divisor.value, *(factor for _, factor in terms))
    if common < 2:
        return None
    inner = fold.linear([(term, factor // common) for term, factor in terms], constant // common)
    return fold.floordiv(inner, fold.const(divisor.value // common))


# --- quotients by a fraction of the length ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _LinearLength:
    """The linear function `slope · n + constant` of the length."""

    slope: Fraction
    constant: Fraction

    def plus(self, other: _LinearLength, factor: int = 1) -> _LinearLength:
        return _LinearLength(self.slope + factor * other.slope, self.constant + factor * other.constant)

    def over(self, divisor: int) -> _LinearLength:
        return _LinearLength(self.slope / divisor, self.constant / divisor)

    def positive_from(self) -> int | None:
        """The smallest length from which on the function is positive; None if it never is."""
        if self.slope > 0:
            return max(1, int(-self.constant / self.slope) + 1)
        return 1 if not self.slope and self.constant > 0 else None


def _line(slope: int, constant: int) -> _LinearLength:
    return _LinearLength(Fraction(slope), Fraction(constant))


_ONE = _line(0, 1)


class _Spelling:
    """Writes `x // e` and `x % e` as conditions, where e is a fraction of the length and x a small multiple of e."""

    def __init__(self) -> None:
        self.start = 1
        self._bounds: dict[Index, tuple[_LinearLength, _LinearLength] | None] = {}

    def change(self, node: Index) -> Index | None:
        if isinstance(node, Compare):
            return self._decided(node)
        if not isinstance(node, Arith) or node.op not in ("floordiv", "mod") or isinstance(node.operands[1], Const):
            return None
        value, divisor = node.operands
        count = self._largest_quotient(value, divisor)
        if count is None:
            return None
        quotient = fold.const(0)
        for j in range(1, count + 1):
            is_reached = fold.less_equal(fold.times(divisor, j), value)
            quotient = fold.choice(is_reached, fold.const(j), quotient)
        return quotient if node.op == "floordiv" else _remainder(value, divisor, count)

    def _decided(self, node: Compare) -> Index | None:
        """Return the truth of a comparison that is the same at all lengths and positions; None for all others."""
        bounds = self._bounds_of(node.value) if node.op == "ge" else None
        if bounds is None:
            return None
        low, high = bounds
        if low.slope >= 0 and low.slope + low.constant >= 0:
            return fold.truth(True)
        return fold.truth(False) if high.slope <= 0 and high.slope + high.constant < 0 else None

    def _largest_quotient(self, value: Index, divisor: Index) -> int | None:
        """The largest quotient that occurs from a length on, to which `start` is raised. None where it is unknown."""
        bounds, divisor_bounds = self._bounds_of(value), self._bounds_of(divisor)
        if bounds is None or divisor_bounds is None or any(isinstance(node, Position) for node in walk(divisor)):
            return None
        positive, not_negative = divisor_bounds[0].positive_from(), bounds[0].plus(_ONE).positive_from()
        if positive is None or not_negative is None or divisor_bounds[0].slope <= 0 or bounds[0].slope < 0:
            return None
        for count in range(MOST_QUOTIENTS):
            start = _line(0, 0).plus(divisor_bounds[0], count + 1).plus(bounds[1], -1).positive_from()
            if start is not None:
                self.start = max(self.start, positive, not_negative, start)
                return count
        return None

    def _bounds_of(self, node: Index) -> tuple[_LinearLength, _LinearLength] | None:
        """Return a lower and an upper bound that hold at every length ≥ 1; None where they are unknown."""
        if node not in self._bounds:
            self._bounds[node] = self._bound(node)
        return self._bounds[node]

    def _bound(self, node: Index) -> tuple[_LinearLength, _LinearLength] | None:
        match node:
            case Const(value=value):
                return _line(0, value), _line(0, value)
            case Extent():
                return _line(1, 0), _line(1, 0)
            case Position():
                return _line(0, 0), _line(1, -1)
            case Linear(terms=terms, constant=constant):
                low = high = _line(0, constant)
                for term, factor in terms:
                    bounds = self._bounds_of(term)
                    if bounds is None:
                        return None
                    below, above = bounds if factor > 0 else (bounds[1], bounds[0])
                    low, high = low.plus(below, factor), high.plus(above, factor)
                return low, high
            case Arith(op="floordiv", operands=(inner, Const(value=divisor))) if divisor > 0:
                bounds = self._bounds_of(inner)
                if bounds is None:
                    return None
                least = _LinearLength(Fraction(0), Fraction(1 - divisor, divisor))
                return bounds[0].over(divisor).plus(least), bounds[1].over(divisor)
            case _:
                return None


def _remainder(value: Index, divisor: Index, count: int) -> Index:
    """Write `value - value // share · share` case by case."""
    result = value
    for j in range(1, count + 1):
        is_reached = fold.less_equal(fold.times(divisor, j), value)
        result = fold.choice(is_reached, fold.sub(value, fold.times(divisor, j)), result)
    return result
