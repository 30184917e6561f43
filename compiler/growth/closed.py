"""Closed forms of the sum over all relations, from periodic counts, powers and roots, with law and derivation."""

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
"""Laws from the slowest growth to the fastest."""

CHECKED = (1, 2, 7, 129, 777, 2500, 6001)
"""Distances beyond its start at which a formula that is not interpolated is compared with counts."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Formulas with their law and derivation; `growth.Growth` describes the fields."""

    law: str
    pairs: Formula
    tiles: Formula | None
    derivation: tuple[str, ...]
    checked: tuple[int, ...]


def find_closed(variants: Sequence[RelationVariant], heads: int, lengths: Lengths, tile: int) -> Closed | None:
    """Find formulas for the sum over relations; None where no formula is proved.

    Raises UncountableError, EvaluationError.
    """
    powers = [find_powers(variant.relation) for variant in variants]
    remainders = [
        variant if p is None else RelationVariant(p.rest, variant.times)
        for variant, p in zip(variants, powers, strict=True)
    ]
    periodic = find_periodic(remainders, lengths, tile)
    if periodic is None:
        return _with_roots(variants, lengths, tile)
    powers_with_times = [(p, variant.times) for p, variant in zip(powers, variants, strict=True) if p is not None]
    if powers_with_times:
        return _with_powers(variants, powers_with_times, periodic, lengths, tile, heads)
    causal = all(_is_causal(variant, lengths) for variant in variants)
    start = periodic.pairs_formula.start
    checked = tuple(sorted(n for n in set(periodic.checked) if n >= start))
    square, linear = periodic.pairs.shares
    law, reason = _law(square / heads, linear / heads, causal)
    return Closed(law, periodic.pairs_formula, periodic.tiles_formula, (*_derivation(periodic), reason), checked)


# --- quasi-polynomials -----------------------------------------------------------------------------------------------


def _is_causal(variant: RelationVariant, lengths: Lengths) -> bool:
    """Whether no later key is visible at one short length; the answer only decides how a law is worded."""
    n = next((n for n in range(250, 1, -1) if lengths.allowed(n)), 0)
    return not np.triu(exact_evaluation.mask(variant.relation.at(n), (0, n), (0, n)), 1).any()


def _law(square: Fraction, linear: Fraction, causal: bool) -> tuple[str, str]:
    """The law of square · n² + linear · n + …, and the reason for it."""
    if square:
        share = square * (2 if causal else 1)
        pair_kind = "causal pairs" if causal else "pairs"
        if share == 1:
            return "O(n²)", f"n² dominates, with the factor of all {pair_kind}"
        factor = f"/{share.denominator}" if share.numerator == 1 else f"·{_number(share)}"
        return (
            f"O(n²{factor})",
            f"n² dominates: {_number(share)} of all {pair_kind}, at every length",
        )
    if linear:
        return f"O(n·w) with w = {_number(linear)}", f"n dominates: w = {_number(linear)} keys per query"
    return "O(1)", "the count is bounded"


def _number(x: Fraction) -> str:
    if x.denominator == 1:
        return f"{x.numerator:,}"
    return f"{x.numerator:,}/{x.denominator:,}" if x.denominator <= 1024 else f"{float(x):.5g}"


def _derivation(periodic: Periodic) -> tuple[str, ...]:
    square, linear = periodic.pairs.shares
    increment = expression_of((Fraction(0), 2 * square, square + linear), LENGTH)
    average = "" if periodic.pairs.period == periodic.pairs.step else ", on average"
    by_remainder = "" if periodic.period == 1 else f" for each remainder of n modulo {periodic.period:,}"
    counted = (
        "the counts at a few lengths, and is checked at others"
        if periodic.counted is None
        else f"the counts at all lengths up to {periodic.counted[1]:,}"
    )
    return (
        f"conditions compare q, k, q − k and n, in steps of {periodic.divisor:,}, with constants of at most "
        f"{periodic.constant:,}: from n = {periodic.proved:,} on, pairs are a polynomial of degree ≤ 2{by_remainder}",
        f"the polynomial follows from {counted}",
        f"after n tokens, the next token adds {written(increment)} pairs{average}",
    )


# --- powers of two ---------------------------------------------------------------------------------------------------


def _with_powers(
    variants: Sequence[RelationVariant],
    powers_with_times: Sequence[tuple[Powers, int]],
    periodic: Periodic,
    lengths: Lengths,
    tile: int,
    heads: int,
) -> Closed:
    pairs = _plus(periodic.pairs_formula, powers_with_times, LENGTH, 1)
    tiles = None
    in_tiles = [(p.in_tiles(tile), times) for p, times in powers_with_times]
    tiled = [(p, times) for p, times in in_tiles if p is not None]
    by_rows = tile_rows(tile)
    if (
        periodic.tiles_formula is not None
        and len(tiled) == len(powers_with_times)
        and by_rows.name in periodic.tiles_formula.names
    ):
        tiles = _plus(periodic.tiles_formula, tiled, by_rows, tile)
    lines = [_describe_powers(p) for p, _ in powers_with_times]
    square, _ = periodic.pairs.shares
    causal = all(_is_causal(variant, lengths) for variant in variants)
    if square:
        law, reason = _law(square / heads, Fraction(0), causal)
    else:
        law, reason = "O(n log n)", "n·L dominates: there are about log₂ n such distances"
    checked = _compared(variants, (pairs, tiles), lengths, tile)
    return Closed(law, pairs, tiles, (*_derivation(periodic), *lines, reason), checked)


def _describe_powers(powers: Powers) -> str:
    pairs = written(tidy(powers.sum(symbol("n"), symbol("L"))))
    gap = f"(d + {powers.first})" if powers.first else "d"
    size, least, last = powers.block, 1 << powers.smallest, powers.largest("L", LENGTH).text
    return (
        f"in addition, blocks of {size:,} at distances d = 2^j ≥ {least:,}: n − {size:,}·{gap} queries with {size:,} "
        f"keys each, {pairs} pairs, where L = {last} is the largest j"
    )


def _plus(
    formula: Formula, powers_with_times: Sequence[tuple[Powers, int]], variable: PolynomialVariable, unit: int
) -> Formula:
    """Add the sums over powers to a formula; a unit of the variable is `unit` tokens."""
    names: dict[str, FormulaName] = {}
    increment, start = 0, formula.start
    for powers, times in powers_with_times:
        name = powers.largest("L", variable)
        letter = names.setdefault(name.text, replace(name, letter="LMJKPQ"[len(names)])).letter
        increment += times * powers.sum(symbol(variable.letter), symbol(letter))
        start = max(start, (powers.start - 1) * unit + 1)
    cases = tuple(FormulaCase(tidy(case.expression + increment), case.below) for case in formula.cases)
    start = -(-start // formula.step) * formula.step
    names_of_variable = tuple(name for name in formula.names if name.letter == variable.letter)
    other_names = tuple(name for name in formula.names if name.letter != variable.letter)
    return Formula(cases, (*names_of_variable, *names.values(), *other_names), start, formula.step)


# --- roots of the length ---------------------------------------------------------------------------------------------


def _with_roots(variants: Sequence[RelationVariant], lengths: Lengths, tile: int) -> Closed | None:
    """The closed form where relations read the root of the length, or have a formula that is one expression in n."""
    import sympy  # slow to import

    names: dict[str, FormulaName] = {}
    laws: list[str] = []
    lines: dict[str, None] = {}
    expression, start = sympy.Integer(0), 1
    for variant in variants:
        roots = find_roots(variant.relation) or _periodic_alone(variant, lengths, tile)
        if roots is None or any(names.setdefault(name.letter, name) != name for name in roots.pairs.names):
            return None
        expression += variant.times * roots.pairs.cases[0].expression
        start = max(start, roots.pairs.start)
        laws.append(roots.law)
        lines.update(dict.fromkeys(roots.derivation))
    law = max(laws, key=LAWS.index)
    pairs = Formula((FormulaCase(tidy(expression)),), tuple(names.values()), start)
    checked = _compared(variants, (pairs, None), lengths, tile)
    return Closed(law, pairs, None, (*lines, f"for large n, s ≈ √n: {law}"), checked)


def _periodic_alone(variant: RelationVariant, lengths: Lengths, tile: int) -> Roots | None:
    periodic = find_periodic([RelationVariant(variant.relation, 1)], lengths, tile)
    if periodic is None or periodic.pairs_formula.names or periodic.pairs_formula.step > 1:
        return None
    square, linear = periodic.pairs.shares
    return Roots(periodic.pairs_formula, "O(n²)" if square else "O(n)" if linear else "O(1)", _derivation(periodic))


def _compared(
    variants: Sequence[RelationVariant], formulas: tuple[Formula, Formula | None], lengths: Lengths, tile: int
) -> tuple[int, ...]:
    """Check formulas against exact counts, and return the lengths that were checked."""
    checked = []
    for n in _lengths_to_check(formulas[0]):
        if lengths.allowed(n):
            try:
                exact = total(variants, n, tile)
            except UncountableError:
                break
            pairs, tiles = formulas
            assert pairs.at(n) == exact.pairs
            assert tiles is None or not tiles.holds(n) or tiles.at(n) == exact.tiles
            checked.append(n)
    return tuple(checked)


def _lengths_to_check(formula: Formula) -> Iterable[int]:
    """The lengths at which to check a formula: its start, and `CHECKED` beyond it."""
    near = (formula.start + distance for distance in (0, *CHECKED))
    return sorted({-(-n // formula.step) * formula.step for n in near})
