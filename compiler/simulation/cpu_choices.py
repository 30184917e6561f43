"""What attention to chosen places costs on a CPU: pieces of gathered queries, lists of them, and the choice itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attnc.compiler.planning.chosen import FILLED
from attnc.compiler.planning.plan import Piece, stretch
from attnc.compiler.planning.rates import Rates
from attnc.compiler.simulation.choices import ExpectedChoice, Float64

LOOKS = 2
"""Every entry of what is chosen is looked at for places that are seen whole, and for those that are seen in part."""


@dataclass(frozen=True, eq=False)
class ChosenWork:
    """An attention of `lanes` sets of `together` heads (batch entries times sets) that choose alike.

    `scored`: scores of the selections that are worked out for it; `averaged`: numbers of keys that they pool.
    `counted`: whether it is known how many places are kept.
    """

    expected: ExpectedChoice
    n_q: int
    lanes: int
    together: int
    scored: int
    averaged: int
    counted: bool

    @property
    def visible(self) -> int:
        """Pairs that are expected, of all attention matrices."""
        return round(self.expected.pairs * self.lanes * self.together)

    @property
    def most(self) -> int:
        """Pairs that there are at most."""
        return self.expected.most * self.lanes * self.together

    def pieces(self) -> Iterator[tuple[Piece, float]]:
        """Pieces, alike ones once, and how often each runs: of the heads that choose alike together."""
        expected = self.expected
        for rows, keys, often in _alike(expected.whole, expected):
            yield _piece(rows, keys, "full"), often * self.lanes
        if expected.triangles:
            for size in np.unique(expected.keys[expected.part > 0]).tolist():
                often = float((expected.keys[expected.part > 0] == size).sum())
                yield _piece(size, size, "causal"), often * self.lanes
            return
        for rows, keys, often in _alike(expected.part, expected):
            yield _piece(rows, keys, 0), often * self.lanes

    def listing_ns(self, rates: Rates, dk: int, dv: int) -> float:
        """To list the queries of each place, and to gather them and what they have so far."""
        entries = self.lanes * self.n_q * len(self.expected.keys) * LOOKS
        pieces = list(self.pieces())
        rows = sum(piece.queries.length * often for piece, often in pieces) * self.together
        calls = sum(often for _, often in pieces) * max(rates.gathered - rates.call, 0.0)
        return entries * rates.listed + rows * (dk + 2 * dv) * rates.scattered + calls

    def choosing_ns(self, rates: Rates) -> float:
        """To score and rank the places."""
        return self.scored * rates.chosen + self.averaged * rates.copy


def _alike(rows: Float64, expected: ExpectedChoice) -> Iterator[tuple[int, int, float]]:
    """(queries filled up, keys, how often) of places that some query is expected to take."""
    some = (rows > 0) & (expected.keys > 0)
    filled = ((rows[some] // FILLED + 1) * FILLED).astype(np.int64)
    taken = 1 - np.exp(-rows[some])  # that anyone does
    kinds, kind = np.unique(np.stack([filled, expected.keys[some]], 1), axis=0, return_inverse=True)
    often = np.bincount(kind.ravel(), taken, minlength=len(kinds))
    for (height, keys), times in zip(kinds.tolist(), often.tolist(), strict=True):
        yield height, keys, times


def _piece(rows: int, keys: int, mask: Literal["full", "causal"] | int) -> Piece:
    return Piece(stretch(0, rows), stretch(0, keys), mask, fresh=False)
