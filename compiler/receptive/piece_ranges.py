"""The keys that queries see in a piece of a plan, whose stretches of queries and keys share a mask.

Sets of tokens are held ascending, as runs, and as marks of the tokens seen so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.arrays import spread
from attnc.compiler.planning.cpu_plan import PlanPiece
from attnc.compiler.planning.pieces import Cover

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


Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

AT_ONCE = 1 << 22
"""Maximum number of pairs to evaluate together."""

Look = Callable[[Int64, MarkedKeys, "Mask | None"], None]
"""(ascending queries, keys, where) → None: mark the keys that at least one query sees, within the mask `where`."""


def look_by_piece(piece: PlanPiece, cover: Cover) -> Look:
    """Return the look-up of a piece: query stretch i sees key stretch i, whole, causally or through a mask."""
    stretches = _Stretches(piece)
    if piece.mask == "full":
        return stretches.look_at_all
    if piece.mask == "causal":
        return stretches.look_back
    assert isinstance(piece.mask, int)
    return stretches.look_by(cover.masks[piece.mask].factors)


class _Stretches:
    """The stretches of queries and keys of a piece."""

    def __init__(self, piece: PlanPiece) -> None:
        self._queries, self._keys = piece.queries.starts(), piece.keys.starts()
        self._of_query, self._of_key = piece.queries.inside(), piece.keys.inside()
        self._plain = piece.queries.is_plain
        self._plain_keys = piece.keys.is_plain

    def look_at_all(self, queries: Int64, keys: MarkedKeys, where: Mask | None) -> None:
        for stretches in self._asked(queries, len(self._of_key)):
            live = stretches if self._plain else stretches[self._marked(stretches, queries).any(axis=1)]
            starts = np.unique(self._keys[live])
            if self._plain_keys:
                keys.add_runs(starts, starts + len(self._of_key), where)
            else:
                keys.add((starts[:, None] + self._of_key).ravel(), where)

    def look_back(self, queries: Int64, keys: MarkedKeys, where: Mask | None) -> None:
        length = len(self._of_query)
        for stretches in self._asked(queries, length):
            live, last = self._last(stretches, queries)
            if self._plain_keys:
                keys.add_runs(self._keys[live], self._keys[live] + last + 1, where)
            else:
                seen = np.arange(length) <= last[:, None]
                keys.add((self._keys[live][:, None] + self._of_key)[seen], where)

    def _last(self, stretches: Int64, queries: Int64) -> tuple[Int64, Int64]:
        """Return the stretches that hold a query, and the position of the last query in each stretch."""
        length = len(self._of_query)
        if self._plain:
            stop = np.searchsorted(queries, self._queries[stretches] + length)
            return stretches, queries[stop - 1] - self._queries[stretches]
        marked = self._marked(stretches, queries)
        live = marked.any(axis=1)
        return stretches[live], length - 1 - marked[live, ::-1].argmax(axis=1)

    def look_by(self, factors: tuple[Mask, ...]) -> Look:
        """Return the look-up by masks. `factors`: a mask for each axis of the stretches."""
        numbers = [factor.astype(np.float32) for factor in factors]  # exact: sums are integers far below 2²⁴
        heights = [len(factor) for factor in factors]

        def look(queries: Int64, keys: MarkedKeys, where: Mask | None) -> None:
            for stretches in self._asked(queries, len(self._of_query) + len(self._of_key)):
                marked = self._marked(stretches, queries)
                live = marked.any(axis=1)
                seen = marked[live].astype(np.float32).reshape(-1, *heights)
                for factor in numbers:
                    seen = np.minimum(np.tensordot(seen, factor, axes=(1, 0)), 1)
                seen = seen.reshape(len(seen), len(self._of_key))
                keys.add((self._keys[stretches[live]][:, None] + self._of_key)[seen > 0.5], where)

        return look

    def _asked(self, queries: Int64, width: int) -> Iterable[Int64]:
        """Yield the stretches with a query between their ends, in batches of at most `AT_ONCE` pairs."""
        ends = self._queries + self._of_query[-1]
        candidates = np.flatnonzero((self._queries <= queries[-1]) & (ends >= queries[0]))
        holds_query = np.searchsorted(queries, self._queries[candidates]) < np.searchsorted(
            queries, ends[candidates], side="right"
        )
        stretches = candidates[holds_query]
        step = max(1, AT_ONCE // width)
        return [stretches[i : i + step] for i in range(0, len(stretches), step)]

    def _marked(self, stretches: Int64, queries: Int64) -> Mask:
        """Return which positions of the stretches are queries: bool (stretches, positions)."""
        tokens = self._queries[stretches][:, None] + self._of_query
        low = int(tokens[:, 0].min())
        is_query = np.zeros(int(tokens[:, -1].max()) - low + 1, dtype=np.bool_)
        inside = queries[np.searchsorted(queries, low) : np.searchsorted(queries, low + len(is_query))]
        is_query[inside - low] = True
        marked: Mask = is_query[tokens - low]
        return marked
