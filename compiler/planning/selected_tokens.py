"""Relations among selected tokens: queries, keys or both are selected once for all rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.exact_evaluation import mask_at
from attnc.compiler.analysis.heads import at_own_head
from attnc.compiler.analysis.intervals import Boxes, classify, fits_word
from attnc.compiler.ir import HeadIndex, Index, Lookup, Tensor, fold
from attnc.compiler.ir.value_nodes import reads
from attnc.compiler.planning.formulas import diagonal_shift
from attnc.compiler.planning.residues import conjuncts

Int64 = NDArray[np.int64]


TILE = 512
"""Number of positions of rows, and of keys, of a tile that is analysed at once."""


@dataclass(frozen=True)
class OneSide:
    """The selected tokens on one side: those for which the truth tensor `chosen` holds at (`row`, `item`).

    `place`: the side, the position "q" or "k".
    """

    chosen: Tensor
    row: Index
    item: Index
    place: str


@dataclass(frozen=True)
class SelectedTokens:
    """A relation that holds where `rest` does, among selected queries and keys; a side of None is not restricted."""

    queries: OneSide | None
    keys: OneSide | None
    rest: Index

    @property
    def sides(self) -> tuple[OneSide, ...]:
        """The sides that a selection restricts."""
        return tuple(side for side in (self.queries, self.keys) if side is not None)

    @property
    def by_head(self) -> bool:
        """Whether each query head has its own selection."""
        return any("head" in side.chosen.dims for side in self.sides)

    @property
    def by_heads(self) -> bool:
        """Whether each query head or each kv head has its own selection."""
        return self.by_head or any("kv_head" in side.chosen.dims for side in self.sides)


def chosen_tokens(visible: Index) -> SelectedTokens | None:
    """Return the relation as one among selected tokens, None if it is none or reads more than positions besides."""
    parts = conjuncts(visible)
    sides: dict[str, OneSide] = {}
    rest = []
    for part in parts:
        side = _side(part)
        if side is None or side.place in sides:
            rest.append(part)
        else:
            sides[side.place] = side
    other_conditions = fold.conjunction(*rest)
    if not sides or any(isinstance(node, Lookup | HeadIndex) for node in other_conditions.below):
        return None
    return SelectedTokens(sides.get("q"), sides.get("k"), other_conditions)


def _side(part: Index) -> OneSide | None:
    """Return the side that a conjunct restricts to selected tokens, None for any other conjunct."""
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
    """The specialised relation among selected tokens.

    `diagonal`: the c if the relation is `k <= q + c`, else None. `states` (row tiles, key tiles): 1 where all rows of a
    tile see all of its keys, -1 where no row sees a key, else 0; None if `diagonal` is given.
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
        state = classify(relation, boxes)
        return cls(relation, None, np.array(np.broadcast_to(state, (len(rows), len(keys))), dtype=np.int8))

    def seen(self, queries: Int64, keys: Int64) -> NDArray[np.bool_] | None:
        """Return the mask (queries, keys) of ascending positions; None if every query sees every key."""
        if self.diagonal is not None:
            if keys[-1] <= queries[0] + self.diagonal:
                return None
            return np.asarray(keys[None] <= queries[:, None] + self.diagonal)
        wide = not fits_word(self.relation, (0, int(queries[-1]) + 1), (0, int(keys[-1]) + 1))
        active = np.ones((len(queries), len(keys)), dtype=np.bool_)
        mask = mask_at(self.relation, queries, keys, active, {}, wide=wide)
        return None if mask.all() else mask

    def blocks(self, queries: Int64, keys: Int64) -> Iterator[GatheredBlock]:
        """Yield the blocks with visible pairs as slices of gathered tokens at positions `queries` and `keys`."""
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
        """Yield, for each tile of rows, the full block and the partial block on the diagonal."""
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
    """A block of gathered rows and keys with visible pairs; `full`: every row sees every key."""

    rows: slice
    keys: slice
    full: bool
