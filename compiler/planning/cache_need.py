"""The tokens of a cache that a pattern needs at any length: a number of first tokens and a number of last tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic

import numpy as np

from attnc.compiler.analysis.box_values import FALSE
from attnc.compiler.analysis.counted_isl import UndecidedError, is_available
from attnc.compiler.analysis.intervals import Boxes, classify
from attnc.compiler.comparison import presburger
from attnc.compiler.ir import Extent, Index, Lookup, Pattern, RoundToInt, Vec, fold
from attnc.compiler.ir.rewrite import substitute, walk
from attnc.compiler.ir.value_nodes import is_own, values_of
from attnc.compiler.lowering.specialise import of_any_length, reads_head

MOST = 1 << 24
"""Maximum number of tokens; a pattern that needs more is treated as needing all."""

FAR = 1 << 40
"""A position beyond every token."""

SECONDS = 10.0
"""Approximate time limit of the search, in seconds."""


@dataclass(frozen=True, slots=True)
class CacheNeed:
    """The keys that the last query and any later one may see: the `first` keys, and the `last` keys up to the query."""

    first: int
    last: int

    def __str__(self) -> str:
        last = f"the last {self.last} token{'s' * (self.last != 1)}"
        return last if not self.first else f"the first {self.first} and {last}"


def cache_need(pattern: Pattern, heads: int, group: int) -> CacheNeed | None:
    """Return the cache that decoding needs, for any number of tokens.

    None where the relation reads inputs, may need all tokens, or is undecided after a few seconds.
    """
    if pattern.documents is not None or pattern.segments or any(node.keys is not None for node in pattern.nodes):
        return None
    values = [value for node in pattern.nodes for value in values_of(node)]
    combined = [value for value in (pattern.combine, pattern.lse) if value is not None]
    vectors = [below for value in values for below in value.below if isinstance(below, Vec) and not is_own(below)]
    vectors += [below for value in combined for below in value.below if isinstance(below, Vec)]
    if any(below.tensor != "q" for below in vectors):
        return None
    search = _Search(monotonic() + SECONDS)
    relations = []
    for node in pattern.nodes:
        if node.family is not None or any(isinstance(below, Lookup | RoundToInt) for below in walk(node.visible)):
            return None
        distinct_heads = range(heads) if reads_head(node.visible) else range(1)
        try:
            relations += [of_any_length(node.visible, head, heads, group) for head in distinct_heads]
        except KeyError:  # the relation reads other sizes
            return None
    return needed_by_all(map(search.need, dict.fromkeys(relations)))


def needed_by_all(needs: Iterable[CacheNeed | None]) -> CacheNeed | None:
    """Return the smallest need that covers all needs."""
    first, last = 0, 0
    for need in needs:
        if need is None:
            return None
        first, last = max(first, need.first), max(last, need.last)
    return CacheNeed(first, last)


class _Search:
    """The search for one pattern, until the time `until` of `time.monotonic`, after which nothing more is proved."""

    def __init__(self, until: float) -> None:
        self._until = until
        self._is_late = False

    def need(self, relation: Index) -> CacheNeed | None:
        """Return the smallest need that covers all visible keys: the smallest `first`, then the smallest `last`."""
        if not self._is_never(relation, MOST, MOST):
            return None
        first = _smallest(lambda first: self._is_never(relation, first, MOST))
        last = _smallest(lambda last: self._is_never(relation, first, last))
        return None if self._is_late else CacheNeed(first, last)

    def _is_never(self, relation: Index, first: int, last: int) -> bool:
        """Whether provably no query sees a key between the `first` keys and the query's `last` keys."""
        q, k = fold.place("q"), fold.place("k")
        moved = substitute(relation, {q: fold.add(q, k, fold.const(first + last)), k: fold.add(k, fold.const(first))})
        if moved is fold.truth(False):
            return True
        if not any(isinstance(node, Extent) for node in walk(moved)):
            zero, far = (np.array([x], dtype=np.int64) for x in (0, FAR))
            state = classify(moved, Boxes(zero, far, zero, far))
            if np.ravel(state)[0] == FALSE:
                return True
        seconds_left = self._until - monotonic()
        if seconds_left <= 0:  # results after the limit depend on the machine, and the layout of a ring cache must not
            self._is_late = True
        if seconds_left <= 0 or not is_available():
            return False
        try:
            return presburger.first_point(_outside(relation, first, last), fold.truth(False), (), seconds_left) is None
        except UndecidedError:
            return False


def _smallest(holds: Callable[[int], bool]) -> int:
    """Return the smallest number for which a monotone condition holds; it must hold for `MOST`."""
    low, high = 0, 1
    while high < MOST and not holds(high):
        low, high = high + 1, high * 2
    if high == 1 and holds(0):
        return 0
    low, high = max(low, 1), min(high, MOST)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _outside(relation: Index, first: int, last: int) -> Index:
    q, k = fold.place("q"), fold.place("k")
    after_first = fold.less_equal(fold.const(first), k)
    before_last = fold.less_equal(fold.const(last), fold.sub(q, k))
    return fold.conjunction(relation, after_first, before_last)
