"""The relation of one head with its length left open: `keys` is how many tokens there are, and the only size in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

from attnc.compiler import fold
from attnc.compiler.ir import Arith, Compare, Const, Extent, HeadIndex, Index, Linear, Position, RoundToInt
from attnc.compiler.lowering.float_tables import tabulated
from attnc.compiler.rewrite import rewrite, walk
from attnc.compiler.verify_ir import checked, verified

MOST_QUOTIENTS = 16
"""Values of a quotient by a share of the length."""


@dataclass(frozen=True, slots=True)
class OpenRelation:
    """A relation over places q and k of n tokens, n being `Extent("keys")`.

    `simple` is the same with quotients by shares of n spelled out, from n = `start` on.
    """

    visible: Index
    simple: Index
    start: int

    @property
    def reads_length(self) -> bool:
        """Whether it depends on n other than through how many tokens there are."""
        return any(isinstance(node, Extent | RoundToInt) for node in walk(self.visible))

    def at(self, n: int) -> Index:
        """The relation among n tokens."""
        return at_length(self.visible, n)


def open_relation(relation: Index, sizes: Mapping[str, Index], head: int, group: int) -> OpenRelation:
    """The relation of a head, other sizes than the length replaced."""

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
    """A relation, condition or integer among n tokens."""
    if not any(isinstance(node, Extent | RoundToInt) for node in walk(relation)):
        return relation
    keys = fold.const(n)

    def change(node: Index) -> Index | None:
        if isinstance(node, RoundToInt):
            return tabulated(node, n, n)
        return keys if isinstance(node, Extent) else None

    return rewrite(relation, change)


def integer_at(node: Index, n: int) -> int:
    """The value of an integer that reads the length alone."""
    value = at_length(node, n)
    assert isinstance(value, Const)
    return value.value


def _reduced(node: Index) -> Index | None:
    """`(g·x + c) // (g·d)` as `(x + c // g) // d`."""
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


# --- quotients by a share of the length ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _LinearLength:
    """`slope · n + constant`."""

    slope: Fraction
    constant: Fraction

    def plus(self, other: _LinearLength, factor: int = 1) -> _LinearLength:
        return _LinearLength(self.slope + factor * other.slope, self.constant + factor * other.constant)

    def over(self, divisor: int) -> _LinearLength:
        return _LinearLength(self.slope / divisor, self.constant / divisor)

    def positive_from(self) -> int | None:
        """The length from which on it is positive."""
        if self.slope > 0:
            return max(1, int(-self.constant / self.slope) + 1)
        return 1 if not self.slope and self.constant > 0 else None


def _line(slope: int, constant: int) -> _LinearLength:
    return _LinearLength(Fraction(slope), Fraction(constant))


_ONE = _line(0, 1)


class _Spelling:
    """`x // e` and `x % e`, where e is a share of the length and x at most some times e, as sums of conditions."""

    def __init__(self) -> None:
        self.start = 1
        self._bounds: dict[Index, tuple[_LinearLength, _LinearLength] | None] = {}

    def change(self, node: Index) -> Index | None:
        if isinstance(node, Compare):
            return self._decided(node)
        if not isinstance(node, Arith) or node.op not in ("floordiv", "mod") or isinstance(node.operands[1], Const):
            return None
        value, share = node.operands
        count = self._most(value, share)
        if count is None:
            return None
        quotient = fold.const(0)
        for j in range(1, count + 1):
            reached = fold.less_equal(fold.times(share, j), value)
            quotient = fold.choice(reached, fold.const(j), quotient)
        return quotient if node.op == "floordiv" else _rest(value, share, count)

    def _decided(self, node: Compare) -> Index | None:
        """Return a comparison's value where no length changes it, else None."""
        bounds = self._of(node.value) if node.op == "ge" else None
        if bounds is None:
            return None
        low, high = bounds
        if low.slope >= 0 and low.slope + low.constant >= 0:
            return fold.truth(True)
        return fold.truth(False) if high.slope <= 0 and high.slope + high.constant < 0 else None

    def _most(self, value: Index, share: Index) -> int | None:
        """The largest quotient from a length on, which goes into `start`."""
        bounds, shares = self._of(value), self._of(share)
        if bounds is None or shares is None or any(isinstance(node, Position) for node in walk(share)):
            return None
        positive, not_negative = shares[0].positive_from(), bounds[0].plus(_ONE).positive_from()
        if positive is None or not_negative is None or shares[0].slope <= 0 or bounds[0].slope < 0:
            return None
        for count in range(MOST_QUOTIENTS):
            from_here = _line(0, 0).plus(shares[0], count + 1).plus(bounds[1], -1).positive_from()
            if from_here is not None:
                self.start = max(self.start, positive, not_negative, from_here)
                return count
        return None

    def _of(self, node: Index) -> tuple[_LinearLength, _LinearLength] | None:
        """A lower and an upper bound that hold for every length ≥ 1."""
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
                    found = self._of(term)
                    if found is None:
                        return None
                    below, above = found if factor > 0 else (found[1], found[0])
                    low, high = low.plus(below, factor), high.plus(above, factor)
                return low, high
            case Arith(op="floordiv", operands=(inner, Const(value=divisor))) if divisor > 0:
                found = self._of(inner)
                if found is None:
                    return None
                least = _LinearLength(Fraction(0), Fraction(1 - divisor, divisor))
                return found[0].over(divisor).plus(least), found[1].over(divisor)
            case _:
                return None


def _rest(value: Index, share: Index, count: int) -> Index:
    """`value - value // share · share`, case by case."""
    result = value
    for j in range(1, count + 1):
        reached = fold.less_equal(fold.times(share, j), value)
        result = fold.choice(reached, fold.sub(value, fold.times(share, j)), result)
    return result
