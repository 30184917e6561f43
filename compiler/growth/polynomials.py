"""Quasi-polynomials: a polynomial for each remainder of the length modulo a period, as one readable formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from attnc.compiler.growth.formula import Formula, FormulaCase, FormulaName, symbol, tidy
from attnc.compiler.ir import Index, fold

Polynomial = tuple[Fraction, Fraction, Fraction]
"""The coefficients of n², n and 1."""

MOST_CASES = 3


@dataclass(frozen=True, slots=True)
class QuasiPolynomial:
    """A polynomial of degree ≤ 2 for each remainder of n modulo `period` that is a multiple of `step`."""

    period: int
    step: int
    by_remainder: Mapping[int, Polynomial]

    def at(self, n: int) -> Fraction:
        """Return the value at n."""
        square, linear, constant = self.by_remainder[n % self.period]
        return (square * n + linear) * n + constant

    @property
    def shares(self) -> tuple[Fraction, Fraction]:
        """The coefficients of n² and n, on average over the remainders."""
        polynomials = list(self.by_remainder.values())
        return sum((p[0] for p in polynomials), Fraction(0)) / len(polynomials), sum(
            (p[1] for p in polynomials), Fraction(0)
        ) / len(polynomials)


def interpolate(value: Callable[[int], int], start: int, period: int, step: int) -> QuasiPolynomial:
    """Interpolate the quasi-polynomial through three values for each remainder, at the first lengths from `start` on.

    `step` divides the period; remainders that are not multiples of `step` are left out.
    """
    first = -(-start // step) * step
    by_remainder = {}
    for n in range(first, first + period, step):
        points = [n, n + period, n + 2 * period]
        by_remainder[n % period] = _through(points, [value(x) for x in points])
    return _shortest(QuasiPolynomial(period, step, by_remainder))


def _through(points: Sequence[int], values: Sequence[int] | Sequence[Fraction]) -> Polynomial:
    (x, y, z), (f, g, h) = points, values
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
    """The variable of a polynomial: the length n, or an integer N computed from n."""

    letter: str
    name: FormulaName | None
    value: Index

    @property
    def names(self) -> tuple[FormulaName, ...]:
        """The letters that a formula in this variable needs."""
        return () if self.name is None else (self.name,)


LENGTH = PolynomialVariable("n", None, fold.extent("keys"))


def tile_rows(tile: int) -> PolynomialVariable:
    """Return the variable N that counts the tile rows of n tokens."""
    value = fold.floordiv(fold.add(fold.extent("keys"), fold.const(tile - 1)), fold.const(tile))
    return PolynomialVariable("N", FormulaName("N", f"⌈n/{tile}⌉", value), value)


def expressed(polynomial: QuasiPolynomial, variable: PolynomialVariable) -> Formula:
    """Write a quasi-polynomial as a few cases in the variable and, where the period is not the step, its remainder r.

    The cases hold for multiples of the smallest step for which at most `MOST_CASES` cases suffice.
    """
    for step in range(polynomial.step, polynomial.period, polynomial.step):
        if polynomial.period % step == 0:
            cases = _in_cases([(r, p) for r, p in sorted(polynomial.by_remainder.items()) if r % step == 0], variable)
            if cases is not None:
                text = f"{variable.letter} mod {polynomial.period:,}"
                remainder = FormulaName("r", text, fold.mod(variable.value, fold.const(polynomial.period)))
                return Formula(cases, (*variable.names, remainder), 0, step)
    case = FormulaCase(expression_of(polynomial.by_remainder[0], variable))
    return Formula((case,), variable.names, 0, polynomial.period)


def expression_of(polynomial: Polynomial, variable: PolynomialVariable) -> Any:
    """Return a polynomial as a sympy expression of a variable."""
    x = symbol(variable.letter)
    square, linear, constant = map(_number, polynomial)
    return tidy(square * x**2 + linear * x + constant)


def _number(x: Fraction) -> Any:
    import sympy  # slow to import

    return sympy.Rational(x.numerator, x.denominator)


def _in_cases(
    polynomials: Sequence[tuple[int, Polynomial]], variable: PolynomialVariable
) -> tuple[FormulaCase, ...] | None:
    """Split remainders into ranges with a constant n² factor, an n factor linear in r, and the rest quadratic in r."""
    cases: list[FormulaCase] = []
    start = 0
    while start < len(polynomials):
        fitted = _Fitted(polynomials[start : start + 3])
        stop = next((i for i in range(start, len(polynomials)) if not fitted.meets(*polynomials[i])), len(polynomials))
        cases.append(
            FormulaCase(fitted.expression(variable), None if stop == len(polynomials) else polynomials[stop][0])
        )
        start = stop
        if len(cases) > MOST_CASES or len(cases) * 3 > len(polynomials) + 2:
            return None
    return tuple(cases)


class _Fitted:
    """The function n²·A + n·(B + D·r) + (a quadratic of r) through the first few remainders."""

    def __init__(self, first: Sequence[tuple[int, Polynomial]]) -> None:
        while len(first) > 1 and not self._fit(first):
            first = first[:-1]
        if len(first) == 1:
            self._fit(first)

    def _fit(self, first: Sequence[tuple[int, Polynomial]]) -> bool:
        remainders = [r for r, _ in first]
        self.square = first[0][1][0]
        self.linear = _line(remainders, [p[1] for _, p in first])
        self.constant = _parabola(remainders, [p[2] for _, p in first])
        return all(self.meets(r, p) for r, p in first)

    def meets(self, r: int, polynomial: Polynomial) -> bool:
        """Whether the function equals the polynomial of a remainder."""
        square, linear, constant = self.constant
        slope, base = self.linear
        return polynomial == (self.square, base + slope * r, (square * r + linear) * r + constant)

    def expression(self, variable: PolynomialVariable) -> Any:
        """Return the function as a sympy expression of the variable and r."""
        x, r = symbol(variable.letter), symbol("r")
        slope, base = map(_number, self.linear)
        square, linear, constant = map(_number, self.constant)
        return tidy(_number(self.square) * x**2 + x * (base + slope * r) + square * r**2 + linear * r + constant)


def _line(points: Sequence[int], values: Sequence[Fraction]) -> tuple[Fraction, Fraction]:
    """The slope and the value at 0 of the line through the first two points."""
    slope = (values[1] - values[0]) / (points[1] - points[0]) if len(points) > 1 else Fraction(0)
    return slope, values[0] - slope * points[0]


def _parabola(points: Sequence[int], values: Sequence[Fraction]) -> Polynomial:
    if len(points) < 3:
        return (Fraction(0), *_line(points, values))
    return _through(points, values)
