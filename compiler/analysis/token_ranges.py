"""The visible keys of a row as a few ranges of adjacent tokens, `first <= k <= last`, with formulas of the row as ends.

A kernel computes its loop bounds from the ends and compares with them for its masks, so that one text serves all
lengths. Solving the relation for q instead gives the ranges of queries that see a key; kernels of key gradients walk
these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Literal

from attnc.compiler.ir import Arith, Bool, Compare, Const, Coord, ExactSelect, Index, Linear, Not, Position, Truth, fold
from attnc.compiler.ir.rewrite import walk

Side = Literal["q", "k"]

MOST_RANGES = 3
"""Maximum number of ranges; a kernel has two loops for each range."""

MOST_PARTS = 16
"""Maximum number of ranges in an intermediate result."""

FAR = 1 << 40
"""A number past every token."""


@dataclass(frozen=True, slots=True)
class TokenRange:
    """The tokens from `first` to `last`, both included, if `condition` holds for the row; otherwise no tokens.

    An end that is None is open. The range is empty if `last` is before `first`.
    """

    first: Index | None
    last: Index | None
    condition: Index

    @property
    def low(self) -> Index | None:
        """`first`, or a number past every token if the condition fails; None if the range has no lower end."""
        if isinstance(self.condition, Truth):
            return self.first
        return fold.choice(self.condition, fold.const(-FAR) if self.first is None else self.first, fold.const(FAR))

    @property
    def high(self) -> Index | None:
        """`last`, or a number before every token if the condition fails; None if the range has no upper end."""
        if isinstance(self.condition, Truth):
            return self.last
        return fold.choice(self.condition, fold.const(FAR) if self.last is None else self.last, fold.const(-FAR))


EVERYTHING = TokenRange(None, None, fold.truth(True))


class _NoRangesError(Exception):
    """Raised if a relation cannot be solved as a few ranges."""


def find_ranges(relation: Index, solved: Side) -> tuple[TokenRange, ...] | None:
    """Return the ranges of positions `solved` that each position of the other side sees; None if they are not a few.

    Ranges may overlap. The relation may read sizes, heads and inputs, about which nothing is assumed.
    """
    try:
        ranges = [_without_condition(token_range) for token_range in _Solver(solved).solve(relation)]
    except _NoRangesError:
        return None
    ranges = [token_range for token_range in ranges if not _is_empty(token_range)]
    return tuple(sorted(ranges, key=_sort_key)) if len(ranges) <= MOST_RANGES else None


def _without_condition(token_range: TokenRange) -> TokenRange:
    """Return the range with its condition moved into one end: into `last` if only that end is closed, else `first`."""
    if isinstance(token_range.condition, Truth):
        return token_range
    if token_range.first is None and token_range.last is not None:
        return TokenRange(None, token_range.high, fold.truth(True))
    return TokenRange(token_range.low, token_range.last, fold.truth(True))


def _is_empty(token_range: TokenRange) -> bool:
    """Whether the range is certainly empty, because positions are not negative."""
    if isinstance(token_range.condition, Truth) and not token_range.condition.value:
        return True
    return token_range.last is not None and any(
        isinstance(n, Const) and n.value < 0 for n in _operands("min", token_range.last)
    )


def _is_never(node: Index) -> bool:
    """Whether a condition on positions certainly fails, because positions are not negative."""
    if not (isinstance(node, Compare) and node.op == "ge"):
        return False
    terms, constant = fold.parts(node.value)
    return constant < 0 and all(isinstance(term, Position) and factor < 0 for term, factor in terms)


def _sort_key(token_range: TokenRange) -> int:
    """Return the sort key of a range: ranges without a lower end come first."""
    return 0 if token_range.first is None else 1


class _Solver:
    """Solves relations for the position of one side."""

    def __init__(self, solved: Side) -> None:
        self._position = fold.place(solved)

    def solve(self, node: Index) -> list[TokenRange]:
        """Return the ranges in which a truth value holds. Raises _NoRangesError."""
        if not self._reads(node):
            if _is_never(node):
                return []
            return [] if isinstance(node, Truth) and not node.value else [replace(EVERYTHING, condition=node)]
        match node:
            case Bool(op="and", operands=operands):
                return self._meet([self.solve(operand) for operand in operands])
            case Bool(op="or", operands=operands):
                return _union([token_range for operand in operands for token_range in self.solve(operand)])
            case ExactSelect(condition=condition, then=then, otherwise=otherwise):
                return self._either(condition, then, otherwise)
            case Not(operand=Bool() as inner):
                parts = [fold.negation(operand) for operand in inner.operands]
                return self.solve(fold.conjunction(*parts) if inner.op == "or" else fold.disjunction(*parts))
            case Not(operand=Compare(op="eq", value=value)):
                return _union([*self.solve(self._at_least(value, 1)), *self.solve(self._at_most(value, -1))])
            case Compare(op="eq", value=value):
                return self._meet([self.solve(self._at_least(value, 0)), self.solve(self._at_most(value, 0))])
            case Compare(op="ge", value=value):
                return self._solve_sum(value)
        raise _NoRangesError

    def _reads(self, node: Index) -> bool:
        """Whether an expression reads the position that is solved for."""
        return self._position in walk(node)

    @staticmethod
    def _at_least(value: Index, least: int) -> Index:
        return fold.nonnegative(fold.add(value, fold.const(-least)))

    @staticmethod
    def _at_most(value: Index, most: int) -> Index:
        return fold.nonnegative(fold.sub(fold.const(most), value))

    def _either(self, condition: Index, then: Index, otherwise: Index) -> list[TokenRange]:
        """Solve a choice of two conditions; a choice that depends on the row only moves into the ends of the ranges."""
        if not self._reads(condition):
            then_ranges, else_ranges = self.solve(then), self.solve(otherwise)
            if (
                len(then_ranges) == len(else_ranges) == 1
                and isinstance(then_ranges[0].condition, Truth)
                and isinstance(else_ranges[0].condition, Truth)
            ):
                return [_choose_ends(condition, then_ranges[0], else_ranges[0])]
        negated = fold.negation(condition)
        return self.solve(fold.disjunction(fold.conjunction(condition, then), fold.conjunction(negated, otherwise)))

    def _meet(self, parts: Sequence[list[TokenRange]]) -> list[TokenRange]:
        """Return the intersection of unions of ranges. Raises _NoRangesError."""
        result = [EVERYTHING]
        for part in parts:
            result = _union([_intersection(a, b) for a, b in product(result, part)])
            if len(result) > MOST_PARTS:
                raise _NoRangesError
        return result

    def _solve_sum(self, value: Index) -> list[TokenRange]:
        """Solve `value >= 0`."""
        terms, constant = fold.parts(value)
        reading = [(term, factor) for term, factor in terms if self._reads(term)]
        if len(reading) != 1:
            raise _NoRangesError
        (term, factor), rest = reading[0], [other for other in terms if other[0] is not reading[0][0]]
        others = fold.linear(rest, constant)
        if factor > 0:  # factor * term >= -others
            return self._solve_term(term, fold.times(fold.floordiv(others, fold.const(factor)), -1), None)
        return self._solve_term(term, None, fold.floordiv(others, fold.const(-factor)))

    def _solve_term(self, term: Index, least: Index | None, most: Index | None) -> list[TokenRange]:
        """Solve `term >= least` or `term <= most`; the other bound is None."""
        match term:
            case Position():
                return [TokenRange(least, most, fold.truth(True))]
            case Linear():
                return self._solve_sum(_slack(term, least, most))
            case Arith(op="floordiv", operands=(inner, Const(value=divisor))) if divisor > 0:
                return self._solve_term(
                    inner, _scaled_bound(least, divisor, 0), _scaled_bound(most, divisor, divisor - 1)
                )
            case Coord(extent=None, stride=Const(value=divisor)) if divisor > 0:
                inner = fold.sub(term.position, term.offset)
                return self._solve_term(
                    inner, _scaled_bound(least, divisor, 0), _scaled_bound(most, divisor, divisor - 1)
                )
            case Arith(op="min" | "max" as op, operands=operands):
                parts = [self.solve(fold.nonnegative(_slack(operand, least, most))) for operand in operands]
                is_conjunction = (op == "min") == (least is not None)
                return self._meet(parts) if is_conjunction else _union([*chain.from_iterable(parts)])
            case Arith(op="abs", operands=(inner,)):
                sides = [fold.nonnegative(_slack(x, least, most)) for x in (inner, fold.times(inner, -1))]
                return self.solve(fold.disjunction(*sides) if most is None else fold.conjunction(*sides))
            case ExactSelect(condition=condition, then=then, otherwise=otherwise):
                sides = [fold.nonnegative(_slack(x, least, most)) for x in (then, otherwise)]
                return self._either(condition, sides[0], sides[1])
        raise _NoRangesError


def _slack(term: Index, least: Index | None, most: Index | None) -> Index:
    """Return an index that is nonnegative exactly if the term satisfies its bound."""
    if least is not None:
        return fold.sub(term, least)
    assert most is not None
    return fold.sub(most, term)


def _scaled_bound(bound: Index | None, factor: int, offset: int) -> Index | None:
    """Return `factor * bound + offset`; None for no bound."""
    return None if bound is None else fold.add(fold.times(bound, factor), fold.const(offset))


# --- combined ranges -------------------------------------------------------------------------------------------------


def _intersection(a: TokenRange, b: TokenRange) -> TokenRange:
    """Return the intersection of two ranges."""
    return TokenRange(
        _tighter_end(fold.maximum, a.first, b.first),
        _tighter_end(fold.minimum, a.last, b.last),
        fold.conjunction(a.condition, b.condition),
    )


def _tighter_end(tighter: object, a: Index | None, b: Index | None) -> Index | None:
    """Return the end of an intersection; `tighter` combines two closed ends."""
    if a is None or b is None:
        return b if a is None else a
    return tighter(a, b)  # type: ignore[operator,no-any-return]


def _choose_ends(condition: Index, a: TokenRange, b: TokenRange) -> TokenRange:
    """Return a range with the ends of `a` if the condition holds, else of `b`."""

    def end(x: Index | None, y: Index | None, open_end: int) -> Index | None:
        if x is None and y is None:
            return None
        sides = (fold.const(open_end) if side is None else side for side in (x, y))
        return fold.choice(condition, *sides)

    return TokenRange(end(a.first, b.first, -FAR), end(a.last, b.last, FAR), fold.truth(True))


def _union(ranges: list[TokenRange]) -> list[TokenRange]:
    """Return the union, with ranges merged that are open on the same side or have an end in common."""
    kept: list[TokenRange] = []
    for token_range in ranges:
        if isinstance(token_range.condition, Truth) and not token_range.condition.value:
            continue
        for i, other in enumerate(kept):
            union = _merged(other, token_range)
            if union is not None:
                kept[i] = union
                break
        else:
            kept.append(token_range)
    if len(kept) > MOST_PARTS:
        raise _NoRangesError
    return _union(kept) if len(kept) < len(ranges) and len(kept) > 1 else kept


def _merged(a: TokenRange, b: TokenRange) -> TokenRange | None:
    """Return the union of two ranges as one range; None if it may have a gap."""
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


def _either_end(farther: object, everything: int, a: Index | None, b: Index | None) -> Index | None:
    """Return the farther of two ends; if a condition puts one end at `everything`, the other end is skipped."""
    if a is None or b is None:
        return None
    for end, other in ((a, b), (b, a)):
        match end:
            case ExactSelect(condition=condition, then=Const(value=x), otherwise=Const(value=y)) if {x, y} == {
                FAR,
                -FAR,
            }:
                sides = (end.then, other) if x == everything else (other, end.otherwise)
                return fold.choice(condition, *sides)
    return farther(a, b)  # type: ignore[operator,no-any-return]


def _operands(op: str, node: Index) -> tuple[Index, ...]:
    """Return the operands of a minimum or maximum; any other index is its own operand."""
    return node.operands if isinstance(node, Arith) and node.op == op else (node,)


def ends(ranges: Sequence[TokenRange]) -> list[Index]:
    """Return the formulas of all ends of ranges."""
    return [end for token_range in ranges for end in (token_range.first, token_range.last) if end is not None]


__all__ = ["EVERYTHING", "FAR", "Side", "TokenRange", "ends", "find_ranges"]
