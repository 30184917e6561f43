"""The cost of attention to selected blocks on a CPU: gathered queries, their lists, and the selection itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np

from attnc.compiler.planning.cpu_plan import PlanPiece, stretch
from attnc.compiler.planning.rates import ChoiceRates
from attnc.compiler.planning.selected_keys import FILLED, parts_of
from attnc.compiler.simulation.expected_choices import ExpectedChoice, Float64
from attnc.compiler.simulation.simulation import Pass

LOOKS = 2
"""Number of scans of the truth tensor: one for blocks that are fully visible, one for blocks visible in part."""


@dataclass(frozen=True)
class Deciding:
    """The work of selections, as counts over batch entries and the heads that select.

    `nodes`: nodes of expressions, each for a block of rows. `rows`: rows that select. `places`: candidates that are
    ranked. `ordered`: candidates that are sorted. `products`: dot products of vectors. `operations`, `tests`: elements
    of operations of scores and of conditions. `pooled`: elements of keys and values that are averaged.
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
        """Add the work of two selections."""
        return Deciding(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def ns(self, rates: ChoiceRates) -> float:
        """Return the nanoseconds of the work at these rates."""
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
    """Gathered queries with the keys of their block: a piece for each of `lanes` heads or parts, `times` times."""

    piece: PlanPiece
    lanes: int
    times: float

    @property
    def rows(self) -> float:
        """The number of rows over all heads and repetitions."""
        return self.piece.queries.length * self.lanes * self.times


@dataclass(frozen=True, eq=False)
class SelectionWork:
    """An attention to selected blocks over `lanes` groups of `together` heads that share a selection.

    `lanes` counts head groups times batch entries. `deciding`: the work of its selections. `counted`: whether the
    number of selected blocks is known before the call.
    """

    expected: ExpectedChoice
    n_q: int
    lanes: int
    together: int
    deciding: Deciding
    counted: bool

    @property
    def visible(self) -> int:
        """The expected visible pairs over all attention matrices."""
        return round(self.expected.pairs * self.lanes * self.together)

    @property
    def most(self) -> int:
        """The maximum number of visible pairs over all attention matrices."""
        return self.expected.most * self.lanes * self.together

    def met(self, threads: int) -> Iterator[Met]:
        """Yield the products of gathered queries and blocks, equal ones once, cut for a number of threads."""
        expected = self.expected
        for rows, keys, count in _expected_blocks(expected.whole, expected, self.together, threads):
            parts = parts_of(self.together, rows, threads)
            yield Met(_piece(rows // parts, keys, "full"), self.together * parts, count * self.lanes)
        if expected.triangles:
            for size in np.unique(expected.keys[expected.part > 0]).tolist():
                count = float((expected.keys[expected.part > 0] == size).sum())
                yield Met(_piece(size, size, "causal"), self.together, count * self.lanes)
            return
        for rows, keys, count in _expected_blocks(expected.part, expected, self.together, 1):
            yield Met(_piece(rows, keys, 0), self.together, count * self.lanes)

    def listing_ns(self, rates: ChoiceRates, dk: int, dv: int, threads: int, stage: Pass) -> float:
        """Return the nanoseconds of listing the queries of each block, gathering them, and merging their results."""
        entries = self.lanes * self.n_q * len(self.expected.keys) * LOOKS
        products = list(self.met(threads))
        rows, calls = sum(x.rows for x in products), sum(x.times for x in products)
        if stage == "backward":
            gathering_ns = calls * rates.piece_backward + rows * ((dk + 2 * dv) * rates.taken + dk * rates.added)
        else:
            gathering_ns = calls * rates.piece + rows * (dk * rates.taken + dv * rates.merged)
        return entries * rates.listed + gathering_ns


def _expected_blocks(
    rows: Float64, expected: ExpectedChoice, together: int, threads: int
) -> Iterator[tuple[int, int, float]]:
    """Yield (padded queries, keys, expected number) for blocks of equal sizes that some query is expected to select."""
    is_seen = (rows > 0) & (expected.keys > 0)
    unit = FILLED * np.array([parts_of(together, int(x), threads) for x in rows[is_seen]], dtype=np.int64)
    padded = ((rows[is_seen] // unit + 1) * unit).astype(np.int64)
    probability = 1 - np.exp(-rows[is_seen])  # the probability that some query selects the block
    kinds, kind = np.unique(np.stack([padded, expected.keys[is_seen]], 1), axis=0, return_inverse=True)
    counts = np.bincount(kind.ravel(), probability, minlength=len(kinds))
    for (height, keys), times in zip(kinds.tolist(), counts.tolist(), strict=True):
        yield height, keys, times


def _piece(rows: int, keys: int, mask: Literal["full", "causal"] | int) -> PlanPiece:
    return PlanPiece(stretch(0, rows), stretch(0, keys), mask)
