"""Attention among chosen tokens: queries that were chosen, or keys that were, by a choice that all rows share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis.exact_evaluation import mask_at
from attnc.compiler.analysis.intervals import Boxes, classify, fits_word
from attnc.compiler.heads import at_own_head
from attnc.compiler.ir import Bool, HeadIndex, Index, Lookup, Tensor
from attnc.compiler.planning.formulas import diagonal_shift
from attnc.compiler.value_nodes import reads

Int64 = NDArray[np.int64]


TILE = 512
"""Positions of rows, and of keys, that are looked at together."""


@dataclass(frozen=True)
class OneSide:
    """The tokens on one side, that of `place`, for which a truth tensor holds, at row `row` and place `item`."""

    chosen: Tensor
    row: Index
    item: Index
    place: str


@dataclass(frozen=True)
class SelectedTokens:
    """A relation that is `rest` among chosen queries and keys; None: all of them."""

    queries: OneSide | None
    keys: OneSide | None
    rest: Index

    @property
    def sides(self) -> tuple[OneSide, ...]:
        """The sides that a selection restricts."""
        return tuple(side for side in (self.queries, self.keys) if side is not None)

    @property
    def by_head(self) -> bool:
        """Whether each query head chooses by itself."""
        return any("head" in side.chosen.dims for side in self.sides)

    @property
    def by_heads(self) -> bool:
        """Whether heads, or those of a kv head, do."""
        return self.by_head or any("kv_head" in side.chosen.dims for side in self.sides)


def chosen_tokens(visible: Index) -> SelectedTokens | None:
    """The relation as one among chosen tokens, where it is one and all else in it depends on positions alone."""
    parts = visible.operands if isinstance(visible, Bool) and visible.op == "and" else (visible,)
    sides: dict[str, OneSide] = {}
    rest = []
    for part in parts:
        side = _side(part)
        if side is None or side.place in sides:
            rest.append(part)
        else:
            sides[side.place] = side
    others = fold.conjunction(*rest)
    if not sides or any(isinstance(node, Lookup | HeadIndex) for node in others.below):
        return None
    return SelectedTokens(sides.get("q"), sides.get("k"), others)


def _side(part: Index) -> OneSide | None:
    if not (isinstance(part, Lookup) and part.tensor.kind == "bool" and len(part.indices) >= 2):
        return None
    row, item = part.indices[-2:]
    if not at_own_head(part, len(part.indices) - 2):
        return None
    if any(isinstance(node, Lookup | HeadIndex) for index in (row, item) for node in index.below):
        return None
    read = reads(row) | reads(item)
    if read == {"q"} or (read == {"k"} and not reads(row)):
        return OneSide(part.tensor, row, item, *read)
    return None


@dataclass(frozen=True, eq=False)
class GatheredRelation:
    """The relation among tokens that were chosen, specialised; `diagonal`: the c of `k <= q + c`, if it is that.

    `states` (row tiles, key tiles): 1 where all of a tile's rows see all of its keys, -1 where none sees one, else 0;
    None beside a diagonal.
    """

    relation: Index
    diagonal: int | None
    states: NDArray[np.int8] | None

    @classmethod
    def of(cls, relation: Index, n_q: int, n_k: int) -> GatheredRelation:
        """Return the gathered relation with the analysis of its tiles."""
        diagonal = diagonal_shift(relation)
        if diagonal is not None:
            return cls(relation, diagonal, None)
        rows, keys = np.arange(0, n_q, TILE), np.arange(0, n_k, TILE)
        last = np.minimum(rows + TILE, n_q) - 1, np.minimum(keys + TILE, n_k) - 1
        boxes = Boxes(rows[:, None], last[0][:, None], keys[None, :], last[1][None, :])
        found = classify(relation, boxes, keyed=False).state
        return cls(relation, None, np.array(np.broadcast_to(found, (len(rows), len(keys))), dtype=np.int8))

    def seen(self, queries: Int64, keys: Int64) -> NDArray[np.bool_] | None:
        """Who sees whom among some rows and keys, both ascending; None where all see all."""
        if self.diagonal is not None:
            if keys[-1] <= queries[0] + self.diagonal:
                return None
            return np.asarray(keys[None] <= queries[:, None] + self.diagonal)
        wide = not fits_word(self.relation, (0, int(queries[-1]) + 1), (0, int(keys[-1]) + 1))
        alive = np.ones((len(queries), len(keys)), dtype=np.bool_)
        found = mask_at(self.relation, queries, keys, alive, {}, wide=wide)
        return None if found.all() else found

    def blocks(self, queries: Int64, keys: Int64) -> Iterator[GatheredBlock]:
        """The rows and keys by number that meet, those of gathered tokens at these positions."""
        if self.diagonal is not None:
            yield from self._below_diagonal(queries, keys, self.diagonal)
            return
        assert self.states is not None
        rows = np.searchsorted(queries, np.arange(len(self.states) + 1) * TILE)
        ends = np.searchsorted(keys, np.arange(self.states.shape[1] + 1) * TILE)
        for tile, states in enumerate(self.states):
            start, stop = int(rows[tile]), int(rows[tile + 1])
            if start == stop:
                continue
            edges = np.flatnonzero(np.diff(np.concatenate([[-1], states, [-1]])))
            for first, last in pairwise(edges.tolist()):
                low, high = int(ends[first]), int(ends[last])
                if states[first] != -1 and low < high:
                    yield GatheredBlock(slice(start, stop), slice(low, high), bool(states[first] == 1))

    def _below_diagonal(self, queries: Int64, keys: Int64, shift: int) -> Iterator[GatheredBlock]:
        for start in range(0, len(queries), TILE):
            rows = slice(start, min(start + TILE, len(queries)))
            ends = np.searchsorted(keys, queries[rows][[0, -1]] + shift, side="right")
            low, high = int(ends[0]), int(ends[1])
            if low:
                yield GatheredBlock(rows, slice(0, low), True)
            if low < high:
                yield GatheredBlock(rows, slice(low, high), False)


@dataclass(frozen=True)
class GatheredBlock:
    """Gathered rows and keys that meet; `full`: all of these rows see all of these keys."""

    rows: slice
    keys: slice
    full: bool
