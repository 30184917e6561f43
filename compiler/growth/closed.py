"""Closed forms of all lanes together, put together from periodic counts, powers and roots, with law and derivation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.growth.counts import UncountableError
from attnc.compiler.growth.formula import Formula, FormulaCase, FormulaName, symbol, tidy, written
from attnc.compiler.growth.periodic import Lengths, Periodic, RelationVariant, find_periodic, total
from attnc.compiler.growth.polynomials import LENGTH, PolynomialVariable, expression_of, tile_rows
from attnc.compiler.growth.powers import Powers, find_powers
from attnc.compiler.growth.roots import Roots, find_roots

LAWS = ("O(1)", "O(√n)", "O(n)", "O(n√n)", "O(n²)")
"""From the slowest to the fastest."""

CHECKED = (1, 2, 7, 129, 777, 2500, 6001)
"""How far beyond its start a formula that is not interpolated is compared with counts."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Formulas with law and derivation; see `growth.Growth`."""

    law: str
    pairs: Formula
    tiles: Formula | None
    derivation: tuple[str, ...]
    checked: tuple[int, ...]


def find_closed(lanes: Sequence[RelationVariant], heads: int, lengths: Lengths, tile: int) -> Closed | None:
    """The formulas of some relations together; None where none is proved.

    Raises UncountableError, EvaluationError.
    """
    powers = [find_powers(lane.relation) for lane in lanes]
    rests = [lane if p is None else RelationVariant(p.rest, lane.times) for lane, p in zip(lanes, powers, strict=True)]
    periodic = find_periodic(rests, lengths, tile)
    if periodic is None:
        return _with_roots(lanes, lengths, tile)
    added = [(p, lane.times) for p, lane in zip(powers, lanes, strict=True) if p is not None]
    if added:
        return _with_powers(lanes, added, periodic, lengths, tile, heads)
    causal = all(_is_causal(lane, lengths) for lane in lanes)
    start = periodic.pairs_formula.start
    checked = tuple(sorted(n for n in set(periodic.checked) if n >= start))
    square, linear = periodic.pairs.shares
    law, reason = _law(square / heads, linear / heads, causal)
    return Closed(law, periodic.pairs_formula, periodic.tiles_formula, (*_derivation(periodic), reason), checked)


# --- quasi-polynomials -----------------------------------------------------------------------------------------------


def _is_causal(lane: RelationVariant, lengths: Lengths) -> bool:
    """Whether no key after its query is seen, in so far as a short length tells; it only decides how a law is put."""
    n = next((n for n in range(250, 1, -1) if lengths.allowed(n)), 0)
    return not np.triu(exact_evaluation.mask(lane.relation.at(n), (0, n), (0, n)), 1).any()


def _law(square: Fraction, linear: Fraction, causal: bool) -> tuple[str, str]:
    """The law of square · n² + linear · n + …, and why."""
    if square:
        share = square * (2 if causal else 1)
        of_what = "causal pairs" if causal else "pairs"
        if share == 1:
            return "O(n²)", f"n² dominates, with the factor of all {of_what}"
        part = f"/{share.denominator}" if share.numerator == 1 else f"·{_number(share)}"
        return (
            f"O(n²{part})",
            f"n² dominates: {_number(share)} of all {of_what}, a share that the length does not change",
        )
    if linear:
        return f"O(n·w) with w = {_number(linear)}", f"n dominates: w = {_number(linear)} keys a query"
    return "O(1)", "nothing grows"


def _number(x: Fraction) -> str:
    if x.denominator == 1:
        return f"{x.numerator:,}"
    return f"{x.numerator:,}/{x.denominator:,}" if x.denominator <= 1024 else f"{float(x):.5g}"


def _derivation(found: Periodic) -> tuple[str, ...]:
    square, linear = found.pairs.shares
    more = expression_of((Fraction(0), 2 * square, square + linear), LENGTH)
    average = "" if found.pairs.period == found.pairs.step else ", on average"
    whose = "" if found.period == 1 else f" for each remainder of n by {found.period:,}"
    counted = (
        "a few lengths, and compared with others"
        if found.counted is None
        else f"the counts of all lengths up to {found.counted[1]:,}"
    )
    return (
        f"conditions compare q, k, q − k and n, in steps of {found.divisor:,}, with constants of at most "
        f"{found.constant:,}: from n = {found.proved:,} on the pairs are a polynomial of degree ≤ 2{whose}",
        f"which one follows from {counted}",
        f"after n tokens one more adds {written(more)} pairs{average}",
    )


# --- powers of two ---------------------------------------------------------------------------------------------------


def _with_powers(
    lanes: Sequence[RelationVariant],
    added: Sequence[tuple[Powers, int]],
    periodic: Periodic,
    lengths: Lengths,
    tile: int,
    heads: int,
) -> Closed:
    pairs = _plus(periodic.pairs_formula, added, LENGTH, 1)
    tiles = None
    in_tiles = [(p.in_tiles(tile), times) for p, times in added]
    small = [(p, times) for p, times in in_tiles if p is not None]
    by_rows = tile_rows(tile)
    if periodic.tiles_formula is not None and len(small) == len(added) and by_rows.name in periodic.tiles_formula.names:
        tiles = _plus(periodic.tiles_formula, small, by_rows, tile)
    lines = [_of_powers(p) for p, _ in added]
    square, _ = periodic.pairs.shares
    causal = all(_is_causal(lane, lengths) for lane in lanes)
    if square:
        law, reason = _law(square / heads, Fraction(0), causal)
    else:
        law, reason = "O(n log n)", "n·L dominates: there are about log₂ n such distances"
    checked = _compared(lanes, (pairs, tiles), lengths, tile)
    return Closed(law, pairs, tiles, (*_derivation(periodic), *lines, reason), checked)


def _of_powers(powers: Powers) -> str:
    pairs = written(tidy(powers.sum(symbol("n"), symbol("L"))))
    gap = f"(d + {powers.first})" if powers.first else "d"
    size, least, last = powers.block, 1 << powers.smallest, powers.largest("L", LENGTH).text
    return (
        f"besides, blocks of {size:,} at distances d = 2^j ≥ {least:,}: n − {size:,}·{gap} queries with {size:,} keys "
        f"each, {pairs} pairs, where L = {last} is the largest j"
    )


def _plus(formula: Formula, added: Sequence[tuple[Powers, int]], of: PolynomialVariable, unit: int) -> Formula:
    """A formula and the sums over powers; one of the variable makes `unit` tokens."""
    names: dict[str, FormulaName] = {}
    more, start = 0, formula.start
    for powers, times in added:
        name = powers.largest("L", of)
        letter = names.setdefault(name.text, replace(name, letter="LMJKPQ"[len(names)])).letter
        more += times * powers.sum(symbol(of.letter), symbol(letter))
        start = max(start, (powers.start - 1) * unit + 1)
    cases = tuple(FormulaCase(tidy(case.expression + more), case.below) for case in formula.cases)
    start = -(-start // formula.step) * formula.step
    own = tuple(name for name in formula.names if name.letter == of.letter)
    rest = tuple(name for name in formula.names if name.letter != of.letter)
    return Formula(cases, (*own, *names.values(), *rest), start, formula.step)


# --- roots of the length ---------------------------------------------------------------------------------------------


def _with_roots(lanes: Sequence[RelationVariant], lengths: Lengths, tile: int) -> Closed | None:
    """Lanes that read the root of the length, and others whose formula is one expression in n."""
    import sympy

    names: dict[str, FormulaName] = {}
    laws: list[str] = []
    lines: dict[str, None] = {}
    expression, start = sympy.Integer(0), 1
    for lane in lanes:
        found = find_roots(lane.relation) or _periodic_alone(lane, lengths, tile)
        if found is None or any(names.setdefault(name.letter, name) != name for name in found.pairs.names):
            return None
        expression += lane.times * found.pairs.cases[0].expression
        start = max(start, found.pairs.start)
        laws.append(found.law)
        lines.update(dict.fromkeys(found.derivation))
    law = max(laws, key=LAWS.index)
    pairs = Formula((FormulaCase(tidy(expression)),), tuple(names.values()), start)
    checked = _compared(lanes, (pairs, None), lengths, tile)
    return Closed(law, pairs, None, (*lines, f"for large n, s ≈ √n: {law}"), checked)


def _periodic_alone(lane: RelationVariant, lengths: Lengths, tile: int) -> Roots | None:
    found = find_periodic([RelationVariant(lane.relation, 1)], lengths, tile)
    if found is None or found.pairs_formula.names or found.pairs_formula.step > 1:
        return None
    square, linear = found.pairs.shares
    return Roots(found.pairs_formula, "O(n²)" if square else "O(n)" if linear else "O(1)", _derivation(found))


def _compared(
    lanes: Sequence[RelationVariant], formulas: tuple[Formula, Formula | None], lengths: Lengths, tile: int
) -> tuple[int, ...]:
    """Lengths at which formulas are right."""
    checked = []
    for n in _some(formulas[0]):
        if lengths.allowed(n):
            try:
                found = total(lanes, n, tile)
            except UncountableError:
                break
            pairs, tiles = formulas
            assert pairs.at(n) == found.pairs
            assert tiles is None or not tiles.holds(n) or tiles.at(n) == found.tiles
            checked.append(n)
    return tuple(checked)


def _some(formula: Formula) -> Iterable[int]:
    """Lengths for which a formula holds."""
    near = (formula.start + more for more in (0, *CHECKED))
    return sorted({-(-n // formula.step) * formula.step for n in near})
