"""Balance of work items over workers: a lower bound for any schedule, and the longest-first schedule."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.planning.tile_work import Int64

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Items:
    """Work items, longest first: `times[i]` items take `size[i]` each."""

    size: Float64
    times: Int64

    @property
    def total(self) -> float:
        """The total time of all items."""
        return float((self.size * self.times).sum())

    @property
    def count(self) -> int:
        """The number of items."""
        return int(self.times.sum())

    @property
    def longest(self) -> float:
        """The time of the longest item."""
        return float(self.size[0]) if len(self.size) else 0.0


def items(size: Float64, times: Int64) -> Items:
    """Return the items sorted by time, longest first."""
    order = np.argsort(-size, kind="stable")
    return Items(size[order].astype(np.float64), times[order])


def least_time(work: Items, workers: int) -> float:
    """Return a lower bound of the time of the busiest worker.

    It is the mean over the workers, or more: of N items that take s or longer, some worker gets ⌈N / workers⌉.
    """
    if not work.count:
        return 0.0
    rounds = -(-np.cumsum(work.times) // workers)
    return max(work.total / workers, float((rounds * work.size).max()))


def scheduled(work: Items, workers: int) -> Float64:
    """Return the times of the workers, longest first, if every free worker takes the longest remaining item.

    Equal items are dealt out evenly except for their last round.
    """
    loads = np.zeros(workers)
    for size, times in zip(work.size.tolist(), work.times.tolist(), strict=True):
        rounds = max(times // workers - 1, 0)
        loads += rounds * size
        rest = times - rounds * workers
        heap = loads.tolist()
        heapq.heapify(heap)
        for _ in range(rest):
            heapq.heapreplace(heap, heap[0] + size)
        loads = np.array(heap)
    return np.sort(loads)[::-1]
