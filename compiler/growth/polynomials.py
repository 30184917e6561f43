"""Quasi-polynomials: a polynomial for each remainder of the length by a period, put into one readable formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from attnc.compiler import fold
from attnc.compiler.growth.formula import FormulaCase, FormulaName, symbol, tidy
from attnc.compiler.ir import Index

Polynomial = tuple[Fraction, Fraction, Fraction]
"""Coefficients of n², n and 1."""

MOST_CASES = 3


@dataclass(frozen=True, slots=True)
class QuasiPolynomial:
    """A polynomial of degree ≤ 2 for each remainder of n by `period` that is a multiple of `step`."""

    period: int
    step: int
    by_remainder: Mapping[int, Polynomial]

    def at(self, n: int) -> Fraction:
        """Its value."""
        square, linear, constant = self.by_remainder[n % self.period]
        return (square * n + linear) * n + constant

    @property
    def shares(self) -> tuple[Fraction, Fraction]:
        """The coefficients of n² and n, on average over the remainders."""
        found = list(self.by_remainder.values())
        return sum((p[0] for p in found), Fraction(0)) / len(found), sum((p[1] for p in found), Fraction(0)) / len(
            found
        )


def interpolate(value: Callable[[int], int], start: int, period: int, step: int) -> QuasiPolynomial:
    """The quasi-polynomial through three values for each remainder, the first ones from `start` on.

    `step` divides the period; remainders that are no multiple of it are left out.
    """
    first = -(-start // step) * step
    found = {}
    for n in range(first, first + period, step):
        points = [n, n + period, n + 2 * period]
        found[n % period] = _through(points, [value(x) for x in points])
    return _shortest(QuasiPolynomial(period, step, found))


def _through(at: Sequence[int], values: Sequence[int]) -> Polynomial:
    (x, y, z), (f, g, h) = at, values
    slope, later = Fraction(g - f, y - x), Fraction(h - g, z - y)
    square = (later - slope) / (z - x)
    linear = slope - square * (x + y)
    return square, linear, f - (square * x + linear) * x


def _shortest(polynomial: QuasiPolynomial) -> QuasiPolynomial:
    """Return the quasi-polynomial with its shortest period."""
    for period in range(polynomial.step, polynomial.period, polynomial.step):
        if polynomial.period % period == 0:
            shorter = {r: polynomial.by_remainder[r] for r in range(0, period, polynomial.step)}
            if all(shorter[r % period] == p for r, p in polynomial.by_remainder.items()):
                return QuasiPolynomial(period, polynomial.step, shorter)
    return polynomial


@dataclass(frozen=True, slots=True)
class PolynomialVariable:
    """The variable of a polynomial: the length n, or a whole number N computed from it."""

    letter: str
    name: FormulaName | None
    value: Index

    @property
    def names(self) -> tuple[FormulaName, ...]:
        """The letters that a formula of it needs."""
        return () if self.name is None else (self.name,)


LENGTH = PolynomialVariable("n", None, fold.extent("keys"))


def tile_rows(tile: int) -> PolynomialVariable:
    """How many rows of tiles n tokens make."""
    value = fold.floordiv(fold.add(fold.extent("keys"), fold.const(tile - 1)), fold.const(tile))
    return PolynomialVariable("N", FormulaName("N", f"⌈n/{tile}⌉", value), value)


@dataclass(frozen=True, slots=True)
class Expressed:
    """A quasi-polynomial in a few cases, for what is a multiple of `step`."""

    cases: tuple[FormulaCase, ...]
    names: tuple[FormulaName, ...]
    step: int


def expressed(polynomial: QuasiPolynomial, of: PolynomialVariable) -> Expressed:
    """A few cases of expressions in the variable and, where the period is not the step, its remainder r.

    They hold for multiples of the least number for which there are so few.
    """
    for step in range(polynomial.step, polynomial.period, polynomial.step):
        if polynomial.period % step == 0:
            cases = _in_cases([(r, p) for r, p in sorted(polynomial.by_remainder.items()) if r % step == 0], of)
            if cases is not None:
                text = f"{of.letter} mod {polynomial.period:,}"
                remainder = FormulaName("r", text, fold.mod(of.value, fold.const(polynomial.period)))
                return Expressed(cases, (*of.names, remainder), step)
    return Expressed((FormulaCase(expression_of(polynomial.by_remainder[0], of)),), of.names, polynomial.period)


def expression_of(polynomial: Polynomial, of: PolynomialVariable) -> Any:
    """A polynomial of a variable."""
    x = symbol(of.letter)
    square, linear, constant = map(_number, polynomial)
    return tidy(square * x**2 + linear * x + constant)


def _number(x: Fraction) -> Any:
    import sympy

    return sympy.Rational(x.numerator, x.denominator)


def _in_cases(found: Sequence[tuple[int, Polynomial]], of: PolynomialVariable) -> tuple[FormulaCase, ...] | None:
    """Stretches of remainders on which n² has one factor, n one linear in r, and the rest is quadratic in r."""
    cases: list[FormulaCase] = []
    start = 0
    while start < len(found):
        fitted = _Fitted(found[start : start + 3])
        stop = next((i for i in range(start, len(found)) if not fitted.meets(*found[i])), len(found))
        cases.append(FormulaCase(fitted.expression(of), None if stop == len(found) else found[stop][0]))
        start = stop
        if len(cases) > MOST_CASES or len(cases) * 3 > len(found) + 2:
            return None
    return tuple(cases)


class _Fitted:
    """n²·A + n·(B + D·r) + (a quadratic of r) through the first few remainders."""

    def __init__(self, first: Sequence[tuple[int, Polynomial]]) -> None:
        while len(first) > 1 and not self._fit(first):
            first = first[:-1]
        if len(first) == 1:
            self._fit(first)

    def _fit(self, first: Sequence[tuple[int, Polynomial]]) -> bool:
        at = [r for r, _ in first]
        self.square = first[0][1][0]
        self.linear = _line(at, [p[1] for _, p in first])
        self.constant = _parabola(at, [p[2] for _, p in first])
        return all(self.meets(r, p) for r, p in first)

    def meets(self, r: int, polynomial: Polynomial) -> bool:
        """Whether it is right for a remainder."""
        square, linear, constant = self.constant
        slope, base = self.linear
        return polynomial == (self.square, base + slope * r, (square * r + linear) * r + constant)

    def expression(self, of: PolynomialVariable) -> Any:
        """As an expression of the variable and r."""
        x, r = symbol(of.letter), symbol("r")
        slope, base = map(_number, self.linear)
        square, linear, constant = map(_number, self.constant)
        return tidy(_number(self.square) * x**2 + x * (base + slope * r) + square * r**2 + linear * r + constant)


def _line(at: Sequence[int], values: Sequence[Fraction]) -> tuple[Fraction, Fraction]:
    """Slope and value at 0 of the line through the first two points."""
    slope = (values[1] - values[0]) / (at[1] - at[0]) if len(at) > 1 else Fraction(0)
    return slope, values[0] - slope * at[0]


def _parabola(at: Sequence[int], values: Sequence[Fraction]) -> Polynomial:
    if len(at) < 3:
        return (Fraction(0), *_line(at, values))
    slope, later = (values[1] - values[0]) / (at[1] - at[0]), (values[2] - values[1]) / (at[2] - at[1])
    square = (later - slope) / (at[2] - at[0])
    linear = slope - square * (at[0] + at[1])
    return square, linear, values[0] - (square * at[0] + linear) * at[0]
