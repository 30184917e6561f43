"""The cost of attention to selected blocks on a CPU: gathered queries, their lists, and the selection itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np

from attnc.compiler.planning.choice_rates import ChoiceRates
from attnc.compiler.planning.cpu_plan import PlanPiece, stretch
from attnc.compiler.planning.selected_keys import FILLED, parts_of
from attnc.compiler.simulation.expected_choices import ExpectedChoice, Float64
from attnc.compiler.simulation.simulation import Pass

LOOKS = 2
"""Every entry of what is chosen is looked at for places that are seen whole, and for those that are seen in part."""


@dataclass(frozen=True)
class Deciding:
    """The work of selections: counts over batch entries and the heads that select.

    `nodes` of expressions, a block of rows each; `rows`, and their `places` that are ranked, or `ordered`; `products`
    of vectors; elements of `operations` and of `tests`; numbers that are `pooled`.
    """

    nodes: int = 0
    rows: int = 0
    places: int = 0
    ordered: int = 0
    products: float = 0.0
    operations: int = 0
    tests: int = 0
    pooled: int = 0

    def __add__(self, other: Deciding) -> Deciding:
        """Both."""
        return Deciding(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def ns(self, rates: ChoiceRates) -> float:
        """Nanoseconds."""
        return (
            self.nodes * rates.node
            + self.rows * rates.row
            + self.places * rates.place
            + self.ordered * rates.ordered
            + self.products * rates.product
            + self.operations * rates.operation
            + self.tests * rates.test
            + self.pooled * rates.pooled
        )


@dataclass(frozen=True)
class Met:
    """Gathered queries and the keys of a place, `times` times: a piece of each of `lanes` heads, or parts of them."""

    piece: PlanPiece
    lanes: int
    times: float

    @property
    def rows(self) -> float:
        """Rows of all heads."""
        return self.piece.queries.length * self.lanes * self.times


@dataclass(frozen=True, eq=False)
class SelectionWork:
    """An attention of `lanes` sets of `together` heads (batch entries times sets) that choose alike.

    `deciding`: the selections that are worked out for it. `counted`: whether it is known how many places are kept.
    """

    expected: ExpectedChoice
    n_q: int
    lanes: int
    together: int
    deciding: Deciding
    counted: bool

    @property
    def visible(self) -> int:
        """Pairs that are expected, of all attention matrices."""
        return round(self.expected.pairs * self.lanes * self.together)

    @property
    def most(self) -> int:
        """Pairs that there are at most."""
        return self.expected.most * self.lanes * self.together

    def met(self, threads: int) -> Iterator[Met]:
        """Yield the products of gathered queries and blocks, equal ones once, cut for a number of threads."""
        expected = self.expected
        for rows, keys, often in _alike(expected.whole, expected, self.together, threads):
            parts = parts_of(self.together, rows, threads)
            yield Met(_piece(rows // parts, keys, "full"), self.together * parts, often * self.lanes)
        if expected.triangles:
            for size in np.unique(expected.keys[expected.part > 0]).tolist():
                often = float((expected.keys[expected.part > 0] == size).sum())
                yield Met(_piece(size, size, "causal"), self.together, often * self.lanes)
            return
        for rows, keys, often in _alike(expected.part, expected, self.together, 1):
            yield Met(_piece(rows, keys, 0), self.together, often * self.lanes)

    def listing_ns(self, rates: ChoiceRates, dk: int, dv: int, threads: int, stage: Pass) -> float:
        """To list the queries of each place, to gather them, and to put back what they have so far."""
        entries = self.lanes * self.n_q * len(self.expected.keys) * LOOKS
        met = list(self.met(threads))
        rows, calls = sum(one.rows for one in met), sum(one.times for one in met)
        if stage == "backward":
            each = calls * rates.piece_backward + rows * ((dk + 2 * dv) * rates.taken + dk * rates.added)
        else:
            each = calls * rates.piece + rows * (dk * rates.taken + dv * rates.merged)
        return entries * rates.listed + each


def _alike(rows: Float64, expected: ExpectedChoice, together: int, threads: int) -> Iterator[tuple[int, int, float]]:
    """(queries filled up, keys, how often) of places that some query is expected to take."""
    some = (rows > 0) & (expected.keys > 0)
    unit = FILLED * np.array([parts_of(together, int(x), threads) for x in rows[some]], dtype=np.int64)
    filled = ((rows[some] // unit + 1) * unit).astype(np.int64)
    taken = 1 - np.exp(-rows[some])  # that anyone does
    kinds, kind = np.unique(np.stack([filled, expected.keys[some]], 1), axis=0, return_inverse=True)
    often = np.bincount(kind.ravel(), taken, minlength=len(kinds))
    for (height, keys), times in zip(kinds.tolist(), often.tolist(), strict=True):
        yield height, keys, times


def _piece(rows: int, keys: int, mask: Literal["full", "causal"] | int) -> PlanPiece:
    return PlanPiece(stretch(0, rows), stretch(0, keys), mask)
