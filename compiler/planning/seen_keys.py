"""Find the keys that a few rows see without visiting every key: undecided stretches are cut into smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.arrays import spread
from attnc.compiler.analysis.box_values import FALSE, TRUE
from attnc.compiler.analysis.intervals import Boxes, classify, fits_word
from attnc.compiler.ir import Index
from attnc.compiler.planning.row_keys import RowKeys
from attnc.spec.source import Span

Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

FIRST = 16
"""Initial number of stretches of keys."""
PARTS = 8
"""Number of parts into which an undecided stretch is cut."""
KEPT = 1 << 16
"""Maximum number of keys for which the list of single keys is cached."""
MOST_SLICES = 4
"""Maximum number of slices of keys that are read as views; more slices are copied instead."""
LEAF = 32
"""Length of a stretch at which its keys are evaluated one by one."""


@dataclass(frozen=True, eq=False)
class SeenKeys:
    """The keys that at least one of a few rows sees.

    `first`, `stop`: stretches of keys that all rows see, in order. `keys`: the other keys, in order. `mask`
    (rows, keys): which row sees which of `keys`.
    """

    first: Int64
    stop: Int64
    keys: Int64
    mask: Mask

    @property
    def count(self) -> int:
        """The number of keys."""
        return int((self.stop - self.first).sum()) + len(self.keys)

    @cached_property
    def slices(self) -> tuple[slice, ...] | None:
        """The keys that all rows see as slices, evenly spaced single keys as one; None if more than MOST_SLICES."""
        slices: list[slice] = []
        i, gaps = 0, np.diff(self.first)
        single = self.stop - self.first == 1
        while i < len(self.first):
            if len(slices) == MOST_SLICES:
                return None
            even = single[i:-1] & single[i + 1 :] & (gaps[i:] == gaps[i : i + 1])
            further = len(even) if even.all() else int(np.argmin(even))
            slices.append(slice(int(self.first[i]), int(self.stop[i + further]), int(gaps[i]) if further else 1))
            i += further + 1
        return tuple(slices)

    @property
    def every(self) -> tuple[Int64, Mask]:
        """All keys in order, and the mask (rows, keys) of which row sees which key."""
        return self._every if self.count <= KEPT else self._all_keys()

    @cached_property
    def _every(self) -> tuple[Int64, Mask]:
        return self._all_keys()

    def _all_keys(self) -> tuple[Int64, Mask]:
        keys_of_all = spread(self.first, self.stop)
        keys = np.concatenate([keys_of_all, self.keys])
        mask = np.concatenate([np.ones((len(self.mask), len(keys_of_all)), dtype=np.bool_), self.mask], axis=1)
        order = np.argsort(keys, kind="stable")
        return keys[order], mask[:, order]


def find_seen_keys(
    relation: Index, rows: tuple[int, int], n_k: int, origins: Mapping[Index, Span] | None = None
) -> SeenKeys:
    """Return the keys that the rows `rows[0] .. rows[1]` of a specialised relation see. Raises EvaluationError."""
    empty = np.zeros(0, dtype=np.int64)
    width = -(-n_k // FIRST)
    first = np.arange(0, n_k, max(width, 1))
    stop = np.minimum(first + width, n_k)
    full_stretches: list[tuple[Int64, Int64]] = [(empty, empty)]
    while True:
        state = _states(relation, rows, first, stop)
        full_stretches.append((first[state == TRUE], stop[state == TRUE]))
        is_open = (state != TRUE) & (state != FALSE)
        first, stop = first[is_open], stop[is_open]
        if not len(first) or width <= LEAF:
            break
        width = -(-width // PARTS)
        starts = (first[:, None] + np.arange(PARTS) * width).ravel()
        ends = np.minimum(starts + width, np.repeat(stop, PARTS))
        first, stop = starts[starts < ends], ends[starts < ends]
    keys = spread(first, stop)
    active = np.ones((rows[1] - rows[0], len(keys)), dtype=np.bool_)
    wide = not fits_word(relation, rows, (0, n_k))
    mask = exact_evaluation.mask_at(relation, np.arange(*rows), keys, active, origins, wide=wide)
    by_all, by_some = mask.all(axis=0), mask.any(axis=0)
    part = by_some & ~by_all
    stretches = [*full_stretches, (keys[by_all], keys[by_all] + 1)]
    starts, ends = (np.concatenate(side) for side in zip(*stretches, strict=True))
    order = np.argsort(starts)
    return SeenKeys(*_joined(starts[order], ends[order]), keys[part], np.ascontiguousarray(mask[:, part]))


def seen_by_rows(keys: RowKeys, rows: tuple[int, int], n_k: int) -> SeenKeys:
    """Return the keys that rows at the positions `rows[0] .. rows[1]` see among `n_k`, by formulas."""
    ranges = [np.array(keys.at(row, n_k), dtype=np.int64).reshape(-1, 2) for row in range(*rows)]
    cuts = np.unique(np.concatenate(ranges))
    first, stop = cuts[:-1], cuts[1:]  # every row sees all keys of a stretch, or none
    mask = np.array([_inside(first, starts_and_stops) for starts_and_stops in ranges]).reshape(len(ranges), len(first))
    of_all = mask.all(axis=0)
    part = mask.any(axis=0) & ~of_all
    lengths = (stop - first)[part]
    return SeenKeys(
        *_joined(first[of_all], stop[of_all]),
        spread(first[part], stop[part]),
        np.ascontiguousarray(np.repeat(mask[:, part], lengths, axis=1)),
    )


def _inside(points: Int64, ranges: Int64) -> Mask:
    """Return for each point whether one of the sorted disjoint ranges (n, 2) holds it."""
    inside: Mask = np.searchsorted(ranges.ravel(), points, side="right") % 2 == 1
    return inside


def _states(relation: Index, rows: tuple[int, int], first: Int64, stop: Int64) -> NDArray[np.int8]:
    """Return, for each stretch of keys, TRUE or FALSE if the relation is so for all rows and its keys, else neither."""
    low, high = (np.full(len(first), row, dtype=np.int64) for row in (rows[0], rows[1] - 1))
    return np.broadcast_to(classify(relation, Boxes(low, high, first, stop - 1)), len(first))


def _joined(first: Int64, stop: Int64) -> tuple[Int64, Int64]:
    """Return sorted stretches with adjacent ones joined."""
    if not len(first):
        return first, stop
    begins = np.append(True, first[1:] != stop[:-1])
    return first[begins], stop[np.append(begins[1:], True)]
