"""Whether two relations are equal, by looking at pairs: of all lengths up to one, which may decide about longer ones.

The proof. Let M be a number that all divisors divide, q = M·a + r and k = M·b + s. For given remainders every term is
then a multiple of a, of b or of a - b, and a constant; a condition compares one of them with a constant of at most C.
Where a gap between 0, a and b is more than C + 1, it can be made that without a condition noticing. So a pair on which
two relations differ, if there is one, has one like it with a and b at most 2·(C + 1), and those are all looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm

import numpy as np

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.linear_forms import UnknownFormError, common_divisor, largest_constant
from attnc.compiler.ir import Extent, Index
from attnc.compiler.rewrite import walk

MOST = 8192
"""Tokens up to which all pairs are looked at for a proof."""

ROWS_AT_ONCE = 1 << 22
"""Pairs that are looked at together."""


@dataclass(frozen=True)
class Difference:
    """A pair that one relation shows and the other does not, among `length` tokens; `first`: the first one does."""

    q: int
    k: int
    length: int
    first: bool


def deciding_length(relations: Iterable[Index]) -> int | None:
    """Tokens whose pairs decide whether relations are equal for every length; None where none is known.

    The relations are specialised and must not depend on the number of tokens.
    """
    roots = list(relations)
    divisor = 1
    for root in roots:
        found = common_divisor(root, MOST)
        if found is None:
            return None
        divisor = lcm(divisor, found)
    try:
        largest = max(largest_constant(root, divisor) for root in roots)
    except UnknownFormError:
        return None
    return divisor * (2 * (largest + 1) + 1)


def first_difference(one: Index, other: Index, n: int) -> Difference | None:
    """The first pair of n tokens on which two relations differ, by query and then key."""
    rows = max(1, ROWS_AT_ONCE // max(n, 1))
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        a, b = (exact_evaluation.mask(relation, (start, stop), (0, n)) for relation in (one, other))
        places = np.argwhere(a != b)
        if len(places):
            q, k = (int(x) for x in places[0])
            return Difference(start + q, k, n, bool(a[q, k]))
    return None


def difference_at(one: Index, other: Index, n: int, q: int, k: int) -> Difference | None:
    """This pair of n tokens, if two relations differ on it."""
    shown, shown_by_other = (exact_evaluation.mask(relation, (q, q + 1), (k, k + 1))[0, 0] for relation in (one, other))
    return None if shown == shown_by_other else Difference(q, k, n, bool(shown))


def reads_length(relation: Index) -> bool:
    """Whether a relation depends on the number of tokens."""
    return any(isinstance(node, Extent) and node.name in ("queries", "keys") for node in walk(relation))
