"""The keys that a few rows see, found without looking at all: what analysis leaves open is cut into parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.box_values import FALSE, TRUE
from attnc.compiler.analysis.intervals import Boxes, classify, fits_word
from attnc.compiler.ir import Index
from attnc.compiler.tile_forms.arrays import spread
from attnc.spec.source import Span

Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

FIRST = 16
"""Stretches of keys to begin with."""
PARTS = 8
"""Parts of a stretch that is open."""
KEPT = 1 << 16
"""Keys up to which they are kept one by one."""
MOST_SLICES = 4
"""Slices of keys that are read where they lie; of more, copies are made."""
LEAF = 32
"""Keys of a stretch that are looked at one by one."""


@dataclass(frozen=True, eq=False)
class SeenKeys:
    """Keys that some of a few rows see: stretches `first .. stop` that all of them see, in order, and other keys, in
    order, with `mask` (rows, keys) of who sees them.
    """

    first: Int64
    stop: Int64
    keys: Int64
    mask: Mask

    @property
    def count(self) -> int:
        """How many keys."""
        return int((self.stop - self.first).sum()) + len(self.keys)

    @cached_property
    def slices(self) -> tuple[slice, ...] | None:
        """Keys that all rows see, in order, single ones at even steps as one slice; None if these are many."""
        found: list[slice] = []
        at, gaps = 0, np.diff(self.first)
        single = self.stop - self.first == 1
        while at < len(self.first):
            if len(found) == MOST_SLICES:
                return None
            even = single[at:-1] & single[at + 1 :] & (gaps[at:] == gaps[at : at + 1])
            further = len(even) if even.all() else int(np.argmin(even))
            found.append(slice(int(self.first[at]), int(self.stop[at + further]), int(gaps[at]) if further else 1))
            at += further + 1
        return tuple(found)

    @property
    def every(self) -> tuple[Int64, Mask]:
        """All keys, in order, and who sees them: (rows, keys)."""
        return self._every if self.count <= KEPT else self._found()

    @cached_property
    def _every(self) -> tuple[Int64, Mask]:
        return self._found()

    def _found(self) -> tuple[Int64, Mask]:
        whole = spread(self.first, self.stop)
        keys = np.concatenate([whole, self.keys])
        mask = np.concatenate([np.ones((len(self.mask), len(whole)), dtype=np.bool_), self.mask], axis=1)
        order = np.argsort(keys, kind="stable")
        return keys[order], mask[:, order]


def find_seen_keys(
    relation: Index, rows: tuple[int, int], n_k: int, origins: Mapping[Index, Span] | None = None
) -> SeenKeys:
    """Return the keys that rows `start .. stop` of a specialised relation see. Raises EvaluationError."""
    empty = np.zeros(0, dtype=np.int64)
    width = -(-n_k // FIRST)
    first = np.arange(0, n_k, max(width, 1))
    stop = np.minimum(first + width, n_k)
    whole: list[tuple[Int64, Int64]] = [(empty, empty)]
    while True:
        state = _states(relation, rows, first, stop)
        whole.append((first[state == TRUE], stop[state == TRUE]))
        is_open = (state != TRUE) & (state != FALSE)
        first, stop = first[is_open], stop[is_open]
        if not len(first) or width <= LEAF:
            break
        width = -(-width // PARTS)
        starts = (first[:, None] + np.arange(PARTS) * width).ravel()
        ends = np.minimum(starts + width, np.repeat(stop, PARTS))
        first, stop = starts[starts < ends], ends[starts < ends]
    keys = spread(first, stop)
    alive = np.ones((rows[1] - rows[0], len(keys)), dtype=np.bool_)
    wide = not fits_word(relation, rows, (0, n_k))
    mask = exact_evaluation.mask_at(relation, np.arange(*rows), keys, alive, origins, wide=wide)
    by_all, by_some = mask.all(axis=0), mask.any(axis=0)
    part = by_some & ~by_all
    found = [*whole, (keys[by_all], keys[by_all] + 1)]
    starts, ends = (np.concatenate(side) for side in zip(*found, strict=True))
    order = np.argsort(starts)
    return SeenKeys(*_joined(starts[order], ends[order]), keys[part], np.ascontiguousarray(mask[:, part]))


def _states(relation: Index, rows: tuple[int, int], first: Int64, stop: Int64) -> NDArray[np.int8]:
    """TRUE, FALSE or neither of the rows and each stretch of keys."""
    low, high = (np.full(len(first), row, dtype=np.int64) for row in (rows[0], rows[1] - 1))
    return np.broadcast_to(classify(relation, Boxes(low, high, first, stop - 1), keyed=False).state, len(first))


def _joined(first: Int64, stop: Int64) -> tuple[Int64, Int64]:
    """Stretches in order, those that touch as one."""
    if not len(first):
        return first, stop
    begins = np.append(True, first[1:] != stop[:-1])
    return first[begins], stop[np.append(begins[1:], True)]
