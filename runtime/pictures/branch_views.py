"""The data of a picture with branches side by side, without torch, which only `branches` needs, to measure states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.runtime.patterns.pattern_description import PatternDescription

Shares = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class BranchView:
    """A branch of a picture.

    `shares` (rows, columns) has a square for `cell` queries by `cell` keys: the visible share of its pairs or, for a
    state, how much is left of a token's value, as a share of the largest. `words` are lines of text: counts, or the
    derivation of a state. `visible`: the number of visible pairs, None for a state.
    """

    name: str
    shares: Shares | None
    cell: int
    words: tuple[str, ...]
    visible: int | None
    left: tuple[float, ...] = ()
    """For a state, the share of a token's value that is left after 0, `cell`, 2·`cell` … tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class BranchesDrawing:
    """All branches of a head at a length; the states come last."""

    title: str
    subtitle: str
    n_q: int
    n_k: int
    views: tuple[BranchView, ...]
    notes: tuple[str, ...]

    @property
    def size_text(self) -> str:
        """The numbers of queries and keys as text."""
        return f"{self.n_q:,} queries × {self.n_k:,} keys"


def has_states(attention: PatternDescription) -> bool:
    """Whether a pattern has a state, so that it is drawn branch by branch."""
    return attention.pattern.recur is not None or bool(attention.pattern.stateful)
