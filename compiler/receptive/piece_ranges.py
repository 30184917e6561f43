"""Keys of a plan's piece that queries see: stretches of queries and of keys that share a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.planning.cpu_plan import PlanPiece
from attnc.compiler.planning.pieces import Cover
from attnc.compiler.receptive.token_sets import MarkedKeys

Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

AT_ONCE = 1 << 22
"""Pairs that are looked at together."""

Look = Callable[[Int64, MarkedKeys, "Mask | None"], None]
"""(queries in order, keys to mark, where) → nothing: the keys that one of the queries sees are marked."""


def look_by_piece(piece: PlanPiece, cover: Cover) -> Look:
    """Stretch i of the queries sees stretch i of the keys: all of it, up to its own place, or by a mask."""
    stretches = _Stretches(piece)
    if piece.mask == "full":
        return stretches.look_at_all
    if piece.mask == "causal":
        return stretches.look_back
    assert isinstance(piece.mask, int)
    return stretches.look_by(cover.masks[piece.mask].factors)


class _Stretches:
    """The stretches of a piece."""

    def __init__(self, piece: PlanPiece) -> None:
        self._queries, self._keys = piece.queries.starts(), piece.keys.starts()
        self._of_query, self._of_key = piece.queries.inside(), piece.keys.inside()
        self._plain = piece.queries.is_plain
        self._plain_keys = piece.keys.is_plain

    def look_at_all(self, queries: Int64, keys: MarkedKeys, where: Mask | None) -> None:
        for some in self._asked(queries, len(self._of_key)):
            live = some if self._plain else some[self._marked(some, queries).any(axis=1)]
            starts = np.unique(self._keys[live])
            if self._plain_keys:
                keys.add_runs(starts, starts + len(self._of_key), where)
            else:
                keys.add((starts[:, None] + self._of_key).ravel(), where)

    def look_back(self, queries: Int64, keys: MarkedKeys, where: Mask | None) -> None:
        length = len(self._of_query)
        for some in self._asked(queries, length):
            live, last = self._last(some, queries)
            if self._plain_keys:
                keys.add_runs(self._keys[live], self._keys[live] + last + 1, where)
            else:
                seen = np.arange(length) <= last[:, None]
                keys.add((self._keys[live][:, None] + self._of_key)[seen], where)

    def _last(self, some: Int64, queries: Int64) -> tuple[Int64, Int64]:
        """Return the stretches that hold a query, and the position of the last query in each."""
        length = len(self._of_query)
        if self._plain:
            after = np.searchsorted(queries, self._queries[some] + length)
            return some, queries[after - 1] - self._queries[some]
        marked = self._marked(some, queries)
        live = marked.any(axis=1)
        return some[live], length - 1 - marked[live, ::-1].argmax(axis=1)

    def look_by(self, factors: tuple[Mask, ...]) -> Look:
        """`factors`: a mask for each axis of the stretches."""
        numbers = [factor.astype(np.float32) for factor in factors]  # their sums are whole, and far below 2²⁴
        heights = [len(factor) for factor in factors]

        def look(queries: Int64, keys: MarkedKeys, where: Mask | None) -> None:
            for some in self._asked(queries, len(self._of_query) + len(self._of_key)):
                marked = self._marked(some, queries)
                live = marked.any(axis=1)
                seen = marked[live].astype(np.float32).reshape(-1, *heights)
                for factor in numbers:
                    seen = np.minimum(np.tensordot(seen, factor, axes=(1, 0)), 1)
                seen = seen.reshape(len(seen), len(self._of_key))
                keys.add((self._keys[some[live]][:, None] + self._of_key)[seen > 0.5], where)

        return look

    def _asked(self, queries: Int64, width: int) -> Iterable[Int64]:
        """Numbers of stretches with one of the queries between their ends, as many at once as memory allows."""
        ends = self._queries + self._of_query[-1]
        near = np.flatnonzero((self._queries <= queries[-1]) & (ends >= queries[0]))
        after = np.searchsorted(queries, self._queries[near]) < np.searchsorted(queries, ends[near], side="right")
        asked = near[after]
        step = max(1, AT_ONCE // width)
        return [asked[i : i + step] for i in range(0, len(asked), step)]

    def _marked(self, some: Int64, queries: Int64) -> Mask:
        """Return the marked queries of stretches: bool (stretches, queries)."""
        tokens = self._queries[some][:, None] + self._of_query
        low = int(tokens[:, 0].min())
        among = np.zeros(int(tokens[:, -1].max()) - low + 1, dtype=np.bool_)
        inside = queries[np.searchsorted(queries, low) : np.searchsorted(queries, low + len(among))]
        among[inside - low] = True
        marked: Mask = among[tokens - low]
        return marked
