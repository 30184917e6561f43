"""Distances with bounds and steps that depend on the length and its square root, as arithmetic progressions of q - k.

A distance δ ≥ 0 is visible to n - δ queries, so the number of visible pairs is the sum of n - δ over the distances. A
union is counted by inclusion and exclusion: intersections of intervals and progressions are progressions again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import isqrt
from typing import Any

from attnc.compiler.growth.formula import Formula, FormulaCase, FormulaName, symbol, tidy, written
from attnc.compiler.growth.open_relation import OpenRelation
from attnc.compiler.ir import Arith, Bool, Compare, ExactSelect, Extent, Index, Not, Position, Truth, fold
from attnc.compiler.ir.rewrite import walk

MOST_SETS = 5


class _OtherKindError(Exception):
    """Raised where a relation is not a union of such progressions."""


@dataclass(frozen=True, slots=True)
class _Size:
    """The size `n · length + root · ⌊√n⌋ + constant`."""

    length: int
    root: int
    constant: int

    def less(self, other: _Size) -> _Size:
        return _Size(self.length - other.length, self.root - other.root, self.constant - other.constant)

    @property
    def expression(self) -> Any:
        return self.length * symbol("n") + self.root * symbol("s") + self.constant

    @property
    def index(self) -> Index:
        n = fold.extent("keys")
        root = fold.times(fold.function("isqrt", n), self.root)
        return fold.add(fold.times(n, self.length), root, fold.const(self.constant))


@dataclass(frozen=True, slots=True)
class _Progression:
    """The distances `low, low + step, …` up to `high`, both inclusive; a step of None is 1."""

    low: _Size
    high: _Size
    step: _Size | None


@dataclass(frozen=True, slots=True)
class Roots:
    """Visible pairs as a formula in n and s = ⌊√n⌋, the law for large n, and the derivation."""

    pairs: Formula
    law: str
    derivation: tuple[str, ...]


def find_roots(relation: OpenRelation) -> Roots | None:
    """Sum over the distances of a relation that reads the root of its length; None for any other relation."""
    if not any(isinstance(node, Arith) and node.op == "isqrt" for node in walk(relation.simple)):
        return None
    reader = _Reader()
    try:
        sets = [reader.progression(conjuncts) for conjuncts in _alternatives(relation.simple)]
        return _summed([p for p in sets if p is not None], reader, relation.start)
    except _OtherKindError:
        return None


def _alternatives(relation: Index) -> list[tuple[Index, ...]]:
    """Split a relation into alternatives, each a conjunction of conditions."""
    match relation:
        case Truth(value=value):
            return [()] if value else []
        case Bool(op="or", operands=operands):
            result = [alternative for operand in operands for alternative in _alternatives(operand)]
        case Bool(operands=operands):
            result = [sum(parts, ()) for parts in product(*map(_alternatives, operands))]
        case ExactSelect(condition=condition, then=then, otherwise=otherwise):
            sides = (fold.conjunction(condition, then), fold.conjunction(fold.negation(condition), otherwise))
            result = [alternative for side in sides for alternative in _alternatives(side)]
        case Not(operand=Bool(op=op, operands=operands)):
            dual = fold.disjunction if op == "and" else fold.conjunction
            result = _alternatives(dual(*map(fold.negation, operands)))
        case _:
            return [(relation,)]
    if len(result) > MOST_SETS:
        raise _OtherKindError
    return result


class _Reader:
    """Reads conditions on q - k. `start`: the length from which on sizes compare as they do for large n."""

    def __init__(self) -> None:
        self.start = 1

    def progression(self, conjuncts: Iterable[Index]) -> _Progression | None:
        """The distances on which all conditions hold; None for no distance. Raises where a distance may be negative."""
        result: _Progression | None = _Progression(_Size(-1, 0, 1), _Size(1, 0, -1), None)
        progressions = [self._progression_of(conjunct) for conjunct in conjuncts]
        for condition in [h for h in progressions if h.step is None]:
            result = None if result is None else self.common(result, condition)
        if result is not None and self.sign(result.low) < 0:
            raise _OtherKindError
        for condition in [h for h in progressions if h.step is not None]:
            result = None if result is None else self.common(result, condition)
        return result

    def _progression_of(self, node: Index) -> _Progression:
        low, high = _Size(-1, 0, 1), _Size(1, 0, -1)
        if not isinstance(node, Compare):
            raise _OtherKindError
        if node.op == "eq":
            return self._congruence(node.value) or _Progression(*self._at(node.value), None)
        side, size = _condition(node.value)
        return _Progression(_negative(size), high, None) if side > 0 else _Progression(low, size, None)

    def _at(self, value: Index) -> tuple[_Size, _Size]:
        side, size = _condition(value)
        distance = _negative(size) if side > 0 else size
        return distance, distance

    def _congruence(self, value: Index) -> _Progression | None:
        """Read `(±(q - k) + c) % step == r`; None for conditions without a remainder."""
        terms, constant = fold.parts(value)
        if len(terms) != 1 or not (isinstance(terms[0][0], Arith) and terms[0][0].op == "mod"):
            return None
        ((remainder, factor),) = terms
        assert isinstance(remainder, Arith)
        side, size = _condition(remainder.operands[0])
        step = _size(remainder.operands[1])
        if abs(factor) != 1 or size.length or size.root:
            raise _OtherKindError
        rest = -constant * factor
        first = side * (rest - size.constant)
        low = _Size(0, 0, first)
        if min(first, rest) < 0 or self.sign(step.less(_Size(0, 0, max(first, rest)))) <= 0:
            raise _OtherKindError
        return _Progression(low, _Size(1, 0, -1), step)

    def common(self, one: _Progression, other: _Progression) -> _Progression | None:
        """Return the intersection of two progressions, or None where it is empty."""
        if one.step is not None and other.step is not None and (one.step, one.low) != (other.step, other.low):
            raise _OtherKindError
        step = one.step or other.step
        low = one.low if self.sign(one.low.less(other.low)) >= 0 else other.low
        high = one.high if self.sign(one.high.less(other.high)) <= 0 else other.high
        progression_with_step = one if one.step is not None else other
        if step is not None and low != progression_with_step.low:
            raise _OtherKindError
        return None if self.sign(high.less(low)) < 0 else _Progression(low, high, step)

    def sign(self, size: _Size) -> int:
        """Return the sign of a size for all n from `start` on; raises `start` until the sign no longer changes."""
        a, b, c = size.length, size.root, size.constant
        if not a and not b:
            return (c > 0) - (c < 0)
        if not a:
            self.start = max(self.start, (abs(c) // abs(b) + 1) ** 2)
            return 1 if b > 0 else -1
        # |a|·n > |b|·√n + |c|
        root = (abs(b) + isqrt(b * b + 4 * abs(a) * abs(c)) + 1) // (2 * abs(a)) + 1
        self.start = max(self.start, root * root)
        return 1 if a > 0 else -1


def _negative(size: _Size) -> _Size:
    return _Size(-size.length, -size.root, -size.constant)


def _condition(value: Index) -> tuple[int, _Size]:
    """Split `±(q - k) + size` into the sign and the size."""
    terms, constant = fold.parts(value)
    places = {term.name: factor for term, factor in terms if isinstance(term, Position)}
    if set(places) != {"q", "k"} or places["q"] + places["k"] or abs(places["q"]) != 1:
        raise _OtherKindError
    rest = fold.linear([(term, factor) for term, factor in terms if not isinstance(term, Position)], constant)
    return places["q"], _size(rest)


def _size(node: Index) -> _Size:
    terms, constant = fold.parts(node)
    length = root = 0
    for term, factor in terms:
        match term:
            case Extent():
                length += factor
            case Arith(op="isqrt", operands=(Extent(),)):
                root += factor
            case _:
                raise _OtherKindError
    return _Size(length, root, constant)


# --- sums ------------------------------------------------------------------------------------------------------------

_LETTERS = "JKMPRTUVW"

_Names = dict[tuple[_Size, _Size], FormulaName]
"""The letters of quotients, by numerator and denominator."""


def _summed(sets: Sequence[_Progression], reader: _Reader, start: int) -> Roots:
    import sympy  # slow to import

    names: _Names = {}
    total, lines = sympy.Integer(0), []
    for size in range(1, len(sets) + 1):
        for subset in combinations(sets, size):
            common: _Progression | None = subset[0]
            for other in subset[1:]:
                common = None if common is None else reader.common(common, other)
            if common is not None:
                part = _sum(common, names, reader)
                total += part if size % 2 else -part
                lines.append(f"{_words(common)}{'' if size == 1 else ', in several sets'}: {written(tidy(part))} pairs")
    root = FormulaName("s", "⌊√n⌋", fold.function("isqrt", fold.extent("keys")))
    pairs = Formula((FormulaCase(tidy(total)),), (root, *names.values()), max(start, reader.start))
    return Roots(pairs, _law(total, names), ("a distance δ = q − k is visible to n − δ queries; s = ⌊√n⌋", *lines))


def _sum(progression: _Progression, names: _Names, reader: _Reader) -> Any:
    """The sum of n - δ over a progression of J + 1 distances δ."""
    n, low = symbol("n"), progression.low.expression
    span = progression.high.less(progression.low)
    if progression.step is None:
        step, last = 1, span.expression
    elif reader.sign(span.less(progression.step)) < 0:
        step = last = 0
    else:
        key = span, progression.step
        text = f"⌊{_bracketed(span)}/{_bracketed(progression.step)}⌋"
        if key not in names and len(names) == len(_LETTERS):
            raise _OtherKindError
        value = fold.floordiv(span.index, progression.step.index)
        last = symbol(names.setdefault(key, FormulaName(_LETTERS[len(names) % len(_LETTERS)], text, value)).letter)
        step = progression.step.expression
    return (last + 1) * (n - low) - step * last * (last + 1) / 2


def _bracketed(size: _Size) -> str:
    text = written(size.expression)
    return f"({text})" if " " in text else text


def _words(progression: _Progression) -> str:
    low, high = written(progression.low.expression), written(progression.high.expression)
    if progression.step is None:
        return f"distances {low} … {high}"
    return f"distances {low} … {high} in steps of {written(progression.step.expression)}"


def _law(total: Any, names: _Names) -> str:
    """The law of the sum for large n, with n = x² and floors ignored."""
    import sympy  # slow to import

    x = sympy.Symbol("x", positive=True)
    real = {symbol("n"): x**2, symbol("s"): x}
    for (span, step), name in names.items():
        real[symbol(name.letter)] = _at_root(span, x) / _at_root(step, x)
    top, bottom = sympy.fraction(sympy.together(sympy.expand(total.subs(real))))
    degree = sympy.degree(top, x) - sympy.degree(bottom, x) if total != 0 else 0
    return {0: "O(1)", 1: "O(√n)", 2: "O(n)", 3: "O(n√n)", 4: "O(n²)"}[int(degree)]


def _at_root(size: _Size, x: Any) -> Any:
    return size.length * x**2 + size.root * x + size.constant
