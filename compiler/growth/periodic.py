"""Counts that are a polynomial of the length for each remainder, interpolated at a few lengths, checked at others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.growth.counts import Count, Counts, UncountableError, count, counts
from attnc.compiler.growth.formula import Formula
from attnc.compiler.growth.open_relation import OpenRelation
from attnc.compiler.growth.periods import LONGEST, Period, find_period
from attnc.compiler.growth.polynomials import (
    LENGTH,
    PolynomialVariable,
    QuasiPolynomial,
    expressed,
    interpolate,
    tile_rows,
)

Int64 = NDArray[np.int64]

LONG = 1 << 14
"""Maximum length in tokens of a formula's counts up to which it is checked at lengths a few times as long."""

MOST_ALONE = 36
"""Maximum number of lengths to count separately, where a relation depends on the length."""

MOST_WORK = 1 << 20
"""Maximum number of 128 × 128 tiles in all lengths that are counted separately."""

MOST_WORK_BELOW = 1 << 9
"""Maximum number of 64 × 64 tiles in the lengths below the proof's start at which a formula is tried."""


@dataclass(frozen=True, slots=True)
class RelationVariant:
    """A relation, and the number of heads or branches that have it."""

    relation: OpenRelation
    times: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths that a pattern allows, all of them multiples of `step`."""

    allowed: Callable[[int], bool]
    step: int


@dataclass(frozen=True, slots=True)
class Periodic:
    """Visible pairs as a quasi-polynomial, proved from `proved` tokens on, with formulas of pairs and live tiles.

    `divisor` and `constant` belong to the proof. `counted`: the first and last length of a range in which every length
    was counted; `checked`: single lengths that were counted.
    """

    pairs: QuasiPolynomial
    pairs_formula: Formula
    tiles_formula: Formula | None
    proved: int
    period: int
    divisor: int
    constant: int
    counted: tuple[int, int] | None
    checked: tuple[int, ...]


def find_periodic(variants: Sequence[RelationVariant], lengths: Lengths, tile: int) -> Periodic | None:
    """Find the formulas of a sum of counts; None where no formula is proved.

    Raises UncountableError.
    """
    periods = _common([find_period(variant.relation) for variant in variants])
    if periods is None:
        return None
    tile_period = _common([find_period(variant.relation, tile) for variant in variants])
    if tile_period is not None:
        tile_period = Period(
            lcm(tile_period.length, tile), tile_period.start, tile_period.divisor, tile_period.constant
        )
    if any(variant.relation.reads_length for variant in variants):
        return _one_by_one(variants, lengths, tile, periods, tile_period)
    return _all_at_once(variants, tile, periods, tile_period)


def _proof(period: Period) -> tuple[int, int, int, int]:
    return period.start, period.length, period.divisor, period.constant


def _common(periods: Sequence[Period | None]) -> Period | None:
    proved = [period for period in periods if period is not None]
    if len(proved) < len(periods):
        return None
    return Period(
        lcm(*(p.length for p in proved)),
        max(p.start for p in proved),
        lcm(*(p.divisor for p in proved)),
        max(p.constant for p in proved),
    )


# --- relations that do not depend on the length ----------------------------------------------------------------------


def _all_at_once(
    variants: Sequence[RelationVariant], tile: int, period: Period, tile_period: Period | None
) -> Periodic | None:
    sums = None
    if tile_period is not None:
        sums = _summed(variants, max(_needed(period), _needed(tile_period)), tile)
    if sums is None:
        tile_period, sums = None, _summed(variants, _needed(period), tile)
    if sums is None:
        return None
    pairs, tiles, whole_rows = sums
    longest = len(pairs) - 1
    polynomial = interpolate(lambda n: int(pairs[n]), period.start, period.length, 1)
    right = _agrees(polynomial, pairs)
    assert right[period.start :].all()  # proved: from here on, the counts are a polynomial
    formula = _formula(polynomial, LENGTH, right, 1, False)
    tiles_formula = None if tile_period is None else _tiles(tiles, whole_rows, tile, tile_period)
    checked = _check(variants, (formula, tiles_formula), longest, tile, 1)
    counted = (formula.start, longest)
    return Periodic(polynomial, formula, tiles_formula, *_proof(period), counted, checked)


def _needed(period: Period) -> int:
    """The longest length that must be counted to interpolate a formula."""
    return period.start + 3 * period.length


def _summed(
    variants: Sequence[RelationVariant], longest: int, tile: int
) -> tuple[Int64, Int64, NDArray[np.bool_]] | None:
    """The pairs at all lengths, the tiles at all tile rows, and the whole rows; None where counting takes too long."""
    if longest > LONGEST:
        return None
    longest = -(-longest // tile) * tile
    try:
        counted: list[tuple[Counts, int]] = [
            (counts(variant.relation.at(longest), longest, tile), variant.times) for variant in variants
        ]
    except UncountableError:
        return None
    pairs = sum((c.pairs * times for c, times in counted), np.zeros(longest + 1, dtype=np.int64))
    tiles = sum((c.tiles * times for c, times in counted), np.zeros(longest // tile + 1, dtype=np.int64))
    return pairs, tiles, np.logical_and.reduce([c.whole for c, _ in counted])


def _agrees(polynomial: QuasiPolynomial, values: Int64) -> NDArray[np.bool_]:
    """Return the mask of the lengths at which the quasi-polynomial has these values."""
    denominator = lcm(*(c.denominator for p in polynomial.by_remainder.values() for c in p))
    table = np.array(
        [[int(c * denominator) for c in polynomial.by_remainder[r]] for r in range(polynomial.period)], dtype=object
    )
    n = np.arange(len(values)).astype(object)
    square, linear, constant = table[np.arange(len(values)) % polynomial.period].T
    return np.asarray((square * n + linear) * n + constant == values.astype(object) * denominator, dtype=np.bool_)


def _formula(
    polynomial: QuasiPolynomial, variable: PolynomialVariable, is_right: NDArray[np.bool_], unit: int, ragged: bool
) -> Formula:
    """Return the formula, starting at the first value from which on it is right.

    A value of the variable stands for `unit` tokens; where `ragged`, also for fewer tokens, down to the value before.
    """
    expression = expressed(polynomial, variable)
    wrong = np.flatnonzero(~is_right[:: expression.step])
    first = max(int(wrong[-1]) + 1 if len(wrong) else 0, 1) * expression.step
    if ragged and expression.step == 1:
        return replace(expression, start=(first - 1) * unit + 1)
    return replace(expression, start=first * unit, step=expression.step * unit)


def _tiles(tiles: Int64, whole_rows: NDArray[np.bool_], tile: int, tile_period: Period) -> Formula:
    """The formula by tile rows; it holds only for multiples of the tile if a cut last row may have fewer live tiles."""
    period, start = tile_period.length // tile, -(-tile_period.start // tile)
    polynomial = interpolate(lambda n: int(tiles[n]), start, period, 1)
    is_right = _agrees(polynomial, tiles)
    assert is_right[start:].all()
    ragged = bool(whole_rows[start:].all())  # two periods suffice: the number of tiles that a cut row lacks is linear
    return _formula(
        polynomial, tile_rows(tile), is_right & np.append(True, whole_rows) if ragged else is_right, tile, ragged
    )


# --- relations that do -----------------------------------------------------------------------------------------------


def _one_by_one(
    variants: Sequence[RelationVariant], lengths: Lengths, tile: int, period: Period, tile_period: Period | None
) -> Periodic | None:
    counted_lengths: dict[int, Count] = {}

    def counted(n: int) -> Count:
        if n not in counted_lengths:
            counted_lengths[n] = total(variants, n, tile)
        return counted_lengths[n]

    step = _affordable(period, lengths.step)
    if step is None:
        return None
    start = -(-period.start // step) * step
    polynomial = interpolate(lambda n: counted(n).pairs, start, lcm(period.length, step), step)
    formula = _lowered(_formula_from(polynomial, LENGTH, start), lengths, lambda n: counted(n).pairs)
    tiles_formula = None
    if tile_period is not None and _affordable(tile_period, tile_step := lcm(tile_period.length, lengths.step)):
        start = -(-tile_period.start // tile_step) * tile_step
        tile_polynomial = interpolate(lambda n: counted(n).tiles, start, tile_step, tile_step)
        tiles_formula = _lowered(_formula_from(tile_polynomial, LENGTH, start), lengths, lambda n: counted(n).tiles)
    longest = period.start + 3 * period.length
    checked = _check(variants, (formula, tiles_formula), longest, tile, lcm(formula.step, lengths.step))
    return Periodic(polynomial, formula, tiles_formula, *_proof(period), None, (*sorted(counted_lengths), *checked))


def _affordable(period: Period, step: int) -> int | None:
    """The step between lengths to count: `step`, or the period if that is too much work; None if both are."""
    for result in (step, lcm(period.length, step)):
        longest = period.start + 3 * lcm(period.length, step)
        number = 3 * (lcm(period.length, step) // result)
        if longest <= LONGEST and number <= MOST_ALONE and number * (1 + longest // 128) ** 2 <= MOST_WORK:
            return result
    return None


def _formula_from(polynomial: QuasiPolynomial, variable: PolynomialVariable, start: int) -> Formula:
    expression = expressed(polynomial, variable)
    return replace(expression, start=-(-start // expression.step) * expression.step)


def _lowered(formula: Formula, lengths: Lengths, value: Callable[[int], int]) -> Formula:
    """Return the formula with its start lowered as long as the formula is right at every length on the way."""
    start, work = formula.start, 0
    for n in range(start - formula.step, 0, -formula.step):
        work += (1 + n // 64) ** 2
        if work > MOST_WORK_BELOW:
            break
        try:
            is_right = lengths.allowed(n) and replace(formula, start=n).at(n) == value(n)
        except UncountableError:
            break
        if not is_right:
            break
        start = n
    return replace(formula, start=start)


def _check(
    variants: Sequence[RelationVariant], formulas: Sequence[Formula | None], longest: int, tile: int, step: int
) -> tuple[int, ...]:
    """Check formulas against exact counts at two longer lengths, and return the lengths that were checked."""
    checked = []
    for target in (longest * 3 // 2 + 5, longest * 7 // 2 + 5) if longest <= LONG else (longest * 9 // 8 + 5,):
        n = -(-target // step) * step
        try:
            exact = total(variants, n, tile)
        except UncountableError:
            continue
        pairs, tiles = formulas
        assert pairs is None or not pairs.holds(n) or pairs.at(n) == exact.pairs
        assert tiles is None or not tiles.holds(n) or tiles.at(n) == exact.tiles
        checked.append(n)
    return tuple(checked)


def total(variants: Sequence[RelationVariant], n: int, tile: int) -> Count:
    """Return the sum of the counts of all relations over n tokens.

    Raises UncountableError.
    """
    if n > LONGEST:
        raise UncountableError
    counted = [(count(variant.relation.at(n), n, tile), variant.times) for variant in variants]
    return Count(sum(c.pairs * times for c, times in counted), sum(c.tiles * times for c, times in counted))
