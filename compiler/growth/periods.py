"""The period with which counts are polynomials of the length, and the length from which on they are; with the proof.

Let q = M·a + r, k = M·b + s and n = M·F·m + t as in `compiler.analysis.linear_forms`, so that for given remainders
r, s, t conditions compare a, b or a - b with `α·m + c`, where α is an integer and |c| ≤ C; the conditions that a and b
lie within the n tokens have this form too. They cut the plane of (a, b) along rows, columns and diagonals into cells on
which the relation is constant. The number of points in a cell is a sum of terms ±p·(p + 1)/2, or 0 where p < 0; each p
combines a row, a column and a diagonal, `α·m + c` with |c| ≤ 3·C + 4. For m ≥ 3·C + 6 the order of the cuts is fixed
and no p changes sign, so for each t the number of visible pairs is a polynomial of m, of degree at most 2.

Where no condition reads n, only the ends of rows and columns move, p contains at most one of them, F is 1, and
m ≥ 2·C + 8 is enough. A tile whose side divides M consists of some remainders (r, s), and is live where one of them is
visible, a relation of a and b with the same cuts: the number of live tiles is such a polynomial as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from attnc.compiler.analysis.linear_forms import StretchError, UnknownFormError, common_divisor, largest_constant
from attnc.compiler.growth.open_relation import OpenRelation

LONGEST = 1 << 19
"""The longest length, in tokens, that is counted to find a formula."""

MOST_PERIOD = 1 << 16

MOST_STRETCH = 64


@dataclass(frozen=True, slots=True)
class Period:
    """A proof that counts are, for each remainder of n modulo `length`, polynomials of degree ≤ 2 from n = `start` on.

    In the proof, conditions compare multiples of `divisor` tokens with constants of at most `constant`.
    """

    length: int
    start: int
    divisor: int
    constant: int


def find_period(relation: OpenRelation, multiple: int = 1) -> Period | None:
    """Find the period of a relation's counts, a multiple of `multiple`; None where it is unproved or too long."""
    divisor = common_divisor(relation.simple, MOST_PERIOD)
    if divisor is None:
        return None
    divisor = lcm(divisor, multiple)
    stretch = 1
    while stretch <= MOST_STRETCH and divisor * stretch <= MOST_PERIOD:
        try:
            constant = max(largest_constant(relation.simple, divisor, stretch), stretch + 1)
        except StretchError as error:
            stretch *= error.by
        except UnknownFormError:
            return None
        else:
            length = divisor * stretch
            units = 3 * constant + 6 if relation.reads_length else 2 * constant + 8
            return Period(length, max(relation.start, length * units), divisor, constant)
    return None


def find_reach(relation: OpenRelation) -> int:
    """Bound the sizes that conditions compare, in tokens; 0 where no bound is known."""
    period = find_period(relation)
    return 0 if period is None else period.divisor * (period.constant + 4)
