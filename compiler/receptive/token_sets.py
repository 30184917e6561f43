"""Sets of tokens: ascending, as runs, and as marks of the tokens seen so far."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.arrays import spread

Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

FEW = 64
"""Maximum number of runs that are marked one after another."""


class MarkedKeys:
    """Marks on the keys of a window: `seen` holds all marks, `fresh` returns the keys that this object marked."""

    def __init__(self, seen: Mask) -> None:
        self.seen = seen
        self._fresh: list[Int64] = []

    def add(self, keys: Int64, where: Mask | None = None) -> None:
        """Mark keys, given in any order, where the mask `where` is true."""
        if where is not None:
            keys = keys[where[keys]]
        keys = keys[~self.seen[keys]]
        if len(keys):
            keys = np.unique(keys)
            self.seen[keys] = True
            self._fresh.append(keys)

    def add_runs(self, first: Int64, stop: Int64, where: Mask | None = None) -> None:
        """Mark the keys `first .. stop` of every run; keys outside the window are left out."""
        first, stop = merged_runs(np.maximum(first, 0), np.minimum(stop, len(self.seen)))
        if len(first) > FEW:
            self.add(spread(first, stop), where)
            return
        for a, b in zip(first.tolist(), stop.tolist(), strict=True):
            wanted = ~self.seen[a:b] if where is None else ~self.seen[a:b] & where[a:b]
            keys = a + np.flatnonzero(wanted)
            self.seen[keys] = True
            self._fresh.append(keys)

    def fresh(self) -> Int64:
        """The newly marked keys, ascending."""
        return np.sort(np.concatenate(self._fresh)) if self._fresh else np.zeros(0, dtype=np.int64)


def runs(tokens: Int64) -> tuple[Int64, Int64]:
    """Return ascending tokens as runs `first .. stop`."""
    cuts = np.flatnonzero(np.diff(tokens) != 1)
    return tokens[np.append(0, cuts + 1)], tokens[np.append(cuts, len(tokens) - 1)] + 1


def merged_runs(first: Int64, stop: Int64) -> tuple[Int64, Int64]:
    """Return the union of runs as ascending runs with gaps between them."""
    nonempty = first < stop
    first, stop = first[nonempty], stop[nonempty]
    if len(first) < 2:
        return first, stop
    order = np.argsort(first, kind="stable")
    first, reach = first[order], np.maximum.accumulate(stop[order])
    begins = np.append(True, first[1:] > reach[:-1])
    return first[begins], reach[np.append(begins[1:], True)]
