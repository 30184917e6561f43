"""Counts that are polynomials of the length, remainder by remainder: found from a few lengths, checked at others."""

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
"""A formula that comes from shorter lengths is compared with counts at others that are a few times as long."""

MOST_ALONE = 36
"""Lengths that are counted one by one, where a relation depends on the length."""

MOST_WORK = 1 << 20
"""Tiles of 128 × 128 that they have together."""

MOST_WORK_BELOW = 1 << 9
"""Tiles of 64 × 64 for lengths below those of the proof, at which a formula is tried."""


@dataclass(frozen=True, slots=True)
class RelationVariant:
    """A relation and how many heads or branches have it."""

    relation: OpenRelation
    times: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """The lengths that a pattern allows, all of them multiples of `step`."""

    allowed: Callable[[int], bool]
    step: int


@dataclass(frozen=True, slots=True)
class Periodic:
    """Visible pairs as a quasi-polynomial that is proved from `proved` on, with formulas of pairs and live tiles.

    `divisor` and `constant` are those of the proof. `counted`: the first and last of the lengths that were all counted;
    `checked`: single lengths that were.
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


def find_periodic(lanes: Sequence[RelationVariant], lengths: Lengths, tile: int) -> Periodic | None:
    """The formulas of a sum of counts; None where none is proved.

    Raises UncountableError.
    """
    periods = _common([find_period(lane.relation) for lane in lanes])
    if periods is None:
        return None
    wide = _common([find_period(lane.relation, tile) for lane in lanes])
    if wide is not None:
        wide = Period(lcm(wide.length, tile), wide.start, wide.divisor, wide.constant)
    if any(lane.relation.reads_length for lane in lanes):
        return _one_by_one(lanes, lengths, tile, periods, wide)
    return _all_at_once(lanes, tile, periods, wide)


def _proof(period: Period) -> tuple[int, int, int, int]:
    return period.start, period.length, period.divisor, period.constant


def _common(periods: Sequence[Period | None]) -> Period | None:
    known = [period for period in periods if period is not None]
    if len(known) < len(periods):
        return None
    return Period(
        lcm(*(p.length for p in known)),
        max(p.start for p in known),
        lcm(*(p.divisor for p in known)),
        max(p.constant for p in known),
    )


# --- relations that do not depend on the length ----------------------------------------------------------------------


def _all_at_once(lanes: Sequence[RelationVariant], tile: int, period: Period, wide: Period | None) -> Periodic | None:
    found_counts = None
    if wide is not None:
        found_counts = _summed(lanes, max(_needed(period), _needed(wide)), tile)
    if found_counts is None:
        wide, found_counts = None, _summed(lanes, _needed(period), tile)
    if found_counts is None:
        return None
    pairs, tiles, whole = found_counts
    most = len(pairs) - 1
    polynomial = interpolate(lambda n: int(pairs[n]), period.start, period.length, 1)
    right = _agrees(polynomial, pairs)
    assert right[period.start :].all()  # that it is a polynomial is proved
    formula = _formula(polynomial, LENGTH, right, 1, False)
    tiles_formula = None if wide is None else _tiles(tiles, whole, tile, wide)
    checked = _check(lanes, (formula, tiles_formula), most, tile, 1)
    counted = (formula.start, most)
    return Periodic(polynomial, formula, tiles_formula, *_proof(period), counted, checked)


def _needed(period: Period) -> int:
    """The longest length that is looked at to find a formula."""
    return period.start + 3 * period.length


def _summed(lanes: Sequence[RelationVariant], most: int, tile: int) -> tuple[Int64, Int64, NDArray[np.bool_]] | None:
    """Pairs of all lengths, tiles of all tile rows, and which rows are whole; None where that is too much."""
    if most > LONGEST:
        return None
    most = -(-most // tile) * tile
    try:
        found: list[tuple[Counts, int]] = [(counts(lane.relation.at(most), most, tile), lane.times) for lane in lanes]
    except UncountableError:
        return None
    pairs = sum((c.pairs * times for c, times in found), np.zeros(most + 1, dtype=np.int64))
    tiles = sum((c.tiles * times for c, times in found), np.zeros(most // tile + 1, dtype=np.int64))
    return pairs, tiles, np.logical_and.reduce([c.whole for c, _ in found])


def _agrees(polynomial: QuasiPolynomial, values: Int64) -> NDArray[np.bool_]:
    """At which lengths the quasi-polynomial has these values."""
    denominator = lcm(*(c.denominator for p in polynomial.by_remainder.values() for c in p))
    table = np.array(
        [[int(c * denominator) for c in polynomial.by_remainder[r]] for r in range(polynomial.period)], dtype=object
    )
    n = np.arange(len(values)).astype(object)
    square, linear, constant = table[np.arange(len(values)) % polynomial.period].T
    return np.asarray((square * n + linear) * n + constant == values.astype(object) * denominator, dtype=np.bool_)


def _formula(
    polynomial: QuasiPolynomial, of: PolynomialVariable, right: NDArray[np.bool_], unit: int, ragged: bool
) -> Formula:
    """The formula from the first number on from which it is right.

    Each number stands for `unit` tokens, or, where `ragged`, for the fewer ones since the number before as well.
    """
    shown = expressed(polynomial, of)
    wrong = np.flatnonzero(~right[:: shown.step])
    first = max(int(wrong[-1]) + 1 if len(wrong) else 0, 1) * shown.step
    if ragged and shown.step == 1:
        return Formula(shown.cases, shown.names, (first - 1) * unit + 1)
    return Formula(shown.cases, shown.names, first * unit, shown.step * unit)


def _tiles(tiles: Int64, whole: NDArray[np.bool_], tile: int, wide: Period) -> Formula:
    """By the number of tile rows; for multiples of the tile alone where a cut last row may have fewer live tiles."""
    period, start = wide.length // tile, -(-wide.start // tile)
    polynomial = interpolate(lambda n: int(tiles[n]), start, period, 1)
    right = _agrees(polynomial, tiles)
    assert right[start:].all()
    ragged = bool(whole[start:].all())  # two periods and more: how many tiles a cut row lacks is linear
    return _formula(polynomial, tile_rows(tile), right & np.append(True, whole) if ragged else right, tile, ragged)


# --- relations that do -----------------------------------------------------------------------------------------------


def _one_by_one(
    lanes: Sequence[RelationVariant], lengths: Lengths, tile: int, period: Period, wide: Period | None
) -> Periodic | None:
    known: dict[int, Count] = {}

    def counted(n: int) -> Count:
        if n not in known:
            known[n] = total(lanes, n, tile)
        return known[n]

    step = _affordable(period, lengths.step)
    if step is None:
        return None
    start = -(-period.start // step) * step
    polynomial = interpolate(lambda n: counted(n).pairs, start, lcm(period.length, step), step)
    formula = _lowered(_alone(polynomial, LENGTH, start), lengths, lambda n: counted(n).pairs)
    tiles_formula = None
    if wide is not None and _affordable(wide, whole := lcm(wide.length, lengths.step)):
        start = -(-wide.start // whole) * whole
        of_tiles = interpolate(lambda n: counted(n).tiles, start, whole, whole)
        tiles_formula = _lowered(_alone(of_tiles, LENGTH, start), lengths, lambda n: counted(n).tiles)
    most = period.start + 3 * period.length
    checked = _check(lanes, (formula, tiles_formula), most, tile, lcm(formula.step, lengths.step))
    return Periodic(polynomial, formula, tiles_formula, *_proof(period), None, (*sorted(known), *checked))


def _affordable(period: Period, step: int) -> int | None:
    """The step of the lengths to count: the one given, or the period where that were too many; None if both are."""
    for result in (step, lcm(period.length, step)):
        longest = period.start + 3 * lcm(period.length, step)
        number = 3 * (lcm(period.length, step) // result)
        if longest <= LONGEST and number <= MOST_ALONE and number * (1 + longest // 128) ** 2 <= MOST_WORK:
            return result
    return None


def _alone(polynomial: QuasiPolynomial, of: PolynomialVariable, start: int) -> Formula:
    shown = expressed(polynomial, of)
    return Formula(shown.cases, shown.names, -(-start // shown.step) * shown.step, shown.step)


def _lowered(formula: Formula, lengths: Lengths, value: Callable[[int], int]) -> Formula:
    """The formula, from as far below as it is right at every length that is looked at."""
    start, work = formula.start, 0
    for n in range(start - formula.step, 0, -formula.step):
        work += (1 + n // 64) ** 2
        if work > MOST_WORK_BELOW:
            break
        try:
            right = lengths.allowed(n) and replace(formula, start=n).at(n) == value(n)
        except UncountableError:
            break
        if not right:
            break
        start = n
    return replace(formula, start=start)


def _check(
    lanes: Sequence[RelationVariant], formulas: Sequence[Formula | None], most: int, tile: int, step: int
) -> tuple[int, ...]:
    """Further lengths at which all formulas are right."""
    checked = []
    for about in (most * 3 // 2 + 5, most * 7 // 2 + 5) if most <= LONG else (most * 9 // 8 + 5,):
        n = -(-about // step) * step
        try:
            found = total(lanes, n, tile)
        except UncountableError:
            continue
        pairs, tiles = formulas
        assert pairs is None or not pairs.holds(n) or pairs.at(n) == found.pairs
        assert tiles is None or not tiles.holds(n) or tiles.at(n) == found.tiles
        checked.append(n)
    return tuple(checked)


def total(lanes: Sequence[RelationVariant], n: int, tile: int) -> Count:
    """The counts of all lanes together among n tokens.

    Raises UncountableError.
    """
    if n > LONGEST:
        raise UncountableError
    found = [(count(lane.relation.at(n), n, tile), lane.times) for lane in lanes]
    return Count(sum(c.pairs * times for c, times in found), sum(c.tiles * times for c, times in found))
