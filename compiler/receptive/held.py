"""The tokens that a state holds: in processing order, all tokens since the last reset."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Held:
    """A state that each token reads: the token knows of all tokens from `start` up to itself in processing order.

    `rank`: the number of each token in processing order. `start`: the rank of the first token since the reset or the
    border of documents before each token.
    """

    rank: Int64
    start: Int64

    @classmethod
    def of(cls, order: Int64, fresh: Mask) -> Held:
        """Return the state of tokens that are processed in `order`; the state is reset before the tokens `fresh`."""
        n = len(order)
        rank = np.empty(n, dtype=np.int64)
        rank[order] = np.arange(n)
        begins = np.where(fresh[order], np.arange(n), 0)
        return cls(rank, np.maximum.accumulate(begins)[rank] if n else rank)

    @property
    def contents(self) -> bytes:
        """A key that is equal for equal states."""
        return self.rank.tobytes() + self.start.tobytes()

    @property
    def looks_back(self) -> bool:
        """Whether no token knows of a later token."""
        return bool((self._last_held <= np.arange(len(self.rank))).all())

    @cached_property
    def _order(self) -> Int64:
        order = np.empty(len(self.rank), dtype=np.int64)
        order[self.rank] = np.arange(len(self.rank))
        return order

    @cached_property
    def _last_held(self) -> Int64:
        """The last token that each token knows of."""
        if not len(self.rank):
            return self.rank
        # Each stretch's tokens are lifted above the tokens of earlier stretches, so one running maximum serves all.
        starts = self.start[self._order]
        lifted = np.append(0, starts[1:] != starts[:-1]).cumsum() * len(starts)
        last: Int64 = np.maximum.accumulate(self._order + lifted) - lifted
        return last[self.rank]

    def look(self, tokens: Int64, seen: Mask) -> Int64:
        """Return the tokens that `tokens` know of and `seen` lacks, and add them to `seen`."""
        ends = np.zeros(len(self.rank) + 1, dtype=np.int64)
        np.add.at(ends, self.start[tokens], 1)
        np.add.at(ends, self.rank[tokens] + 1, -1)
        tokens_held = self._order[np.flatnonzero(ends.cumsum()[:-1] > 0)]
        fresh = np.sort(tokens_held[~seen[tokens_held]])
        seen[fresh] = True
        return fresh

    def shows(self, tokens: Int64, keys: Int64) -> Mask:
        """Return which tokens know of which keys: bool (tokens, keys)."""
        key_rank = self.rank[keys]
        result: Mask = (key_rank >= self.start[tokens, None]) & (key_rank <= self.rank[tokens, None])
        return result
