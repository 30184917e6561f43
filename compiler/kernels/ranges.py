"""The visible keys of a row as few ranges of adjacent tokens, `first <= k <= last`, whose ends are formulas of the row.

A kernel computes its loop bounds from the ends, and its masks by comparing with them; so one text serves all lengths.
The same relation solved for q gives the ranges of queries that see a key, which the gradients of keys walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from attnc.compiler import fold
from attnc.compiler.ir import Arith, Bool, Compare, Const, Coord, ExactSelect, Index, Linear, Not, Position, Truth
from attnc.compiler.rewrite import walk

Side = Literal["q", "k"]

MOST_RANGES = 3
"""A kernel has two loops for each range."""

MOST_PARTS = 16
"""Ranges on the way there."""

FAR = 1 << 40
"""Past every token."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """The tokens from `first` to `last`, both included, where `condition` holds of the row, else none.

    None leaves an end open. Where `last` is before `first` there are none.
    """

    first: Index | None
    last: Index | None
    condition: Index

    @property
    def low(self) -> Index | None:
        """`first`, past every token where the condition fails; None for the first token of all."""
        if isinstance(self.condition, Truth):
            return self.first
        return fold.choice(self.condition, fold.const(-FAR) if self.first is None else self.first, fold.const(FAR))

    @property
    def high(self) -> Index | None:
        """`last`, before every token where the condition fails; None for the last token of all."""
        if isinstance(self.condition, Truth):
            return self.last
        return fold.choice(self.condition, fold.const(FAR) if self.last is None else self.last, fold.const(-FAR))


EVERYTHING = TokenRange(None, None, fold.truth(True))


class _NoRangesError(Exception):
    """The relation is none of ranges."""


def find_ranges(relation: Index, solved: Side) -> tuple[TokenRange, ...] | None:
    """The ranges of places `solved` that a relation leaves to each of the other's; None where it is none of few.

    Ranges may overlap. The relation may read sizes, heads and inputs: nothing is known of them.
    """
    try:
        found = [_closed(one) for one in _Solver(solved).solve(relation)]
    except _NoRangesError:
        return None
    found = [one for one in found if not _is_empty(one)]
    return tuple(sorted(found, key=_starts)) if len(found) <= MOST_RANGES else None


def _closed(one: TokenRange) -> TokenRange:
    """The condition in one end, where both are open or closed alike it does not matter in which."""
    if isinstance(one.condition, Truth):
        return one
    if one.first is None and one.last is not None:
        return TokenRange(None, one.high, fold.truth(True))
    return TokenRange(one.low, one.last, fold.truth(True))


def _is_empty(one: TokenRange) -> bool:
    """Whether nothing is in it, as places are not negative."""
    if isinstance(one.condition, Truth) and not one.condition.value:
        return True
    return one.last is not None and any(isinstance(n, Const) and n.value < 0 for n in _operands("min", one.last))


def _is_never(node: Index) -> bool:
    """Whether a condition of places fails as none is negative."""
    if not (isinstance(node, Compare) and node.op == "ge"):
        return False
    terms, constant = fold.parts(node.value)
    return constant < 0 and all(isinstance(term, Position) and factor < 0 for term, factor in terms)


def _starts(one: TokenRange) -> int:
    """Ranges that start with the first token come first."""
    return 0 if one.first is None else 1


class _Solver:
    """Relations solved for one place."""

    def __init__(self, solved: Side) -> None:
        self._place = fold.place(solved)

    def solve(self, node: Index) -> list[TokenRange]:
        """The ranges of a truth value. Raises _NoRangesError."""
        if not self._reads(node):
            if _is_never(node):
                return []
            return [] if isinstance(node, Truth) and not node.value else [replace(EVERYTHING, condition=node)]
        match node:
            case Bool(op="and", operands=operands):
                return self._meet([self.solve(operand) for operand in operands])
            case Bool(op="or", operands=operands):
                return _joined([one for operand in operands for one in self.solve(operand)])
            case ExactSelect(condition=condition, then=then, otherwise=otherwise):
                return self._either(condition, then, otherwise)
            case Not(operand=Bool() as inner):
                parts = [fold.negation(operand) for operand in inner.operands]
                return self.solve(fold.conjunction(*parts) if inner.op == "or" else fold.disjunction(*parts))
            case Not(operand=Compare(op="eq", value=value)):
                return _joined([*self.solve(self._at_least(value, 1)), *self.solve(self._at_most(value, -1))])
            case Compare(op="eq", value=value):
                return self._meet([self.solve(self._at_least(value, 0)), self.solve(self._at_most(value, 0))])
            case Compare(op="ge", value=value):
                return self._solve_sum(value)
        raise _NoRangesError

    def _reads(self, node: Index) -> bool:
        return self._place in walk(node)

    @staticmethod
    def _at_least(value: Index, least: int) -> Index:
        return fold.nonnegative(fold.add(value, fold.const(-least)))

    @staticmethod
    def _at_most(value: Index, most: int) -> Index:
        return fold.nonnegative(fold.sub(fold.const(most), value))

    def _either(self, condition: Index, then: Index, otherwise: Index) -> list[TokenRange]:
        """One side or the other; the ends of single ranges are chosen where the condition is of the row."""
        if not self._reads(condition):
            a, b = self.solve(then), self.solve(otherwise)
            if len(a) == len(b) == 1 and isinstance(a[0].condition, Truth) and isinstance(b[0].condition, Truth):
                return [_chosen(condition, a[0], b[0])]
        negated = fold.negation(condition)
        return self.solve(fold.disjunction(fold.conjunction(condition, then), fold.conjunction(negated, otherwise)))

    def _meet(self, parts: Sequence[list[TokenRange]]) -> list[TokenRange]:
        result = [EVERYTHING]
        for part in parts:
            result = _joined([_both(a, b) for a, b in product(result, part)])
            if len(result) > MOST_PARTS:
                raise _NoRangesError
        return result

    def _solve_sum(self, value: Index) -> list[TokenRange]:
        """`value >= 0`."""
        terms, constant = fold.parts(value)
        reading = [(term, factor) for term, factor in terms if self._reads(term)]
        if len(reading) != 1:
            raise _NoRangesError
        (term, factor), rest = reading[0], [pair for pair in terms if pair[0] is not reading[0][0]]
        others = fold.linear(rest, constant)
        if factor > 0:  # factor * term >= -others
            return self._solve_term(term, fold.times(fold.floordiv(others, fold.const(factor)), -1), None)
        return self._solve_term(term, None, fold.floordiv(others, fold.const(-factor)))

    def _solve_term(self, term: Index, least: Index | None, most: Index | None) -> list[TokenRange]:
        """`term >= least`, or `term <= most`; one of them is None."""
        match term:
            case Position():
                return [TokenRange(least, most, fold.truth(True))]
            case Linear():
                return self._solve_sum(_gap(term, least, most))
            case Arith(op="floordiv", operands=(inner, Const(value=divisor))) if divisor > 0:
                return self._solve_term(inner, _scaled(least, divisor, 0), _scaled(most, divisor, divisor - 1))
            case Coord(extent=None, stride=Const(value=divisor)) if divisor > 0:
                inner = fold.sub(term.position, term.offset)
                return self._solve_term(inner, _scaled(least, divisor, 0), _scaled(most, divisor, divisor - 1))
            case Arith(op="min" | "max" as op, operands=operands):
                parts = [self.solve(fold.nonnegative(_gap(operand, least, most))) for operand in operands]
                all_of = (op == "min") == (least is not None)
                return self._meet(parts) if all_of else _joined([one for part in parts for one in part])
            case Arith(op="abs", operands=(inner,)):
                sides = [fold.nonnegative(_gap(x, least, most)) for x in (inner, fold.times(inner, -1))]
                return self.solve(fold.disjunction(*sides) if most is None else fold.conjunction(*sides))
            case ExactSelect(condition=condition, then=then, otherwise=otherwise):
                sides = [fold.nonnegative(_gap(x, least, most)) for x in (then, otherwise)]
                return self._either(condition, sides[0], sides[1])
        raise _NoRangesError


def _gap(term: Index, least: Index | None, most: Index | None) -> Index:
    """Return an index that is not negative where a term lies on its side of a bound."""
    if least is not None:
        return fold.sub(term, least)
    assert most is not None
    return fold.sub(most, term)


def _scaled(bound: Index | None, factor: int, more: int) -> Index | None:
    return None if bound is None else fold.add(fold.times(bound, factor), fold.const(more))


# --- ranges together -------------------------------------------------------------------------------------------------


def _both(a: TokenRange, b: TokenRange) -> TokenRange:
    return TokenRange(
        _extreme(fold.maximum, a.first, b.first),
        _extreme(fold.minimum, a.last, b.last),
        fold.conjunction(a.condition, b.condition),
    )


def _extreme(of: object, a: Index | None, b: Index | None) -> Index | None:
    if a is None or b is None:
        return b if a is None else a
    return of(a, b)  # type: ignore[operator,no-any-return]


def _chosen(condition: Index, a: TokenRange, b: TokenRange) -> TokenRange:
    """The ends of one range or of the other."""

    def end(x: Index | None, y: Index | None, open_end: int) -> Index | None:
        if x is None and y is None:
            return None
        sides = (fold.const(open_end) if side is None else side for side in (x, y))
        return fold.choice(condition, *sides)

    return TokenRange(end(a.first, b.first, -FAR), end(a.last, b.last, FAR), fold.truth(True))


def _joined(ranges: list[TokenRange]) -> list[TokenRange]:
    """The union: ranges that are open on one side, or have an end in common, are one."""
    kept: list[TokenRange] = []
    for one in ranges:
        if isinstance(one.condition, Truth) and not one.condition.value:
            continue
        for i, other in enumerate(kept):
            both = _united(other, one)
            if both is not None:
                kept[i] = both
                break
        else:
            kept.append(one)
    if len(kept) > MOST_PARTS:
        raise _NoRangesError
    return _joined(kept) if len(kept) < len(ranges) and len(kept) > 1 else kept


def _united(a: TokenRange, b: TokenRange) -> TokenRange | None:
    """The union of two ranges as one, None where it may have a gap."""
    if a.condition is b.condition:
        if a.first is b.first and a.last is not None and b.last is not None:
            return replace(a, last=fold.maximum(a.last, b.last))
        if a.last is b.last and a.first is not None and b.first is not None:
            return replace(a, first=fold.minimum(a.first, b.first))
    if a.first is None and b.first is None:
        return TokenRange(None, _either_end(fold.maximum, FAR, a.high, b.high), fold.truth(True))
    if a.last is None and b.last is None:
        return TokenRange(_either_end(fold.minimum, -FAR, a.low, b.low), None, fold.truth(True))
    return None


def _either_end(of: object, everything: int, a: Index | None, b: Index | None) -> Index | None:
    """The farther of two ends; where a condition puts one at `everything`, the other is not asked."""
    if a is None or b is None:
        return None
    for one, other in ((a, b), (b, a)):
        match one:
            case ExactSelect(condition=condition, then=Const(value=x), otherwise=Const(value=y)) if {x, y} == {
                FAR,
                -FAR,
            }:
                sides = (one.then, other) if x == everything else (other, one.otherwise)
                return fold.choice(condition, *sides)
    return of(a, b)  # type: ignore[operator,no-any-return]


def _operands(op: str, node: Index) -> tuple[Index, ...]:
    """Return the operands of a minimum or maximum."""
    return node.operands if isinstance(node, Arith) and node.op == op else (node,)


def ends(ranges: Sequence[TokenRange]) -> list[Index]:
    """All formulas of ranges."""
    return [end for one in ranges for end in (one.first, one.last) if end is not None]


__all__ = ["EVERYTHING", "FAR", "Side", "TokenRange", "ends", "find_ranges"]
