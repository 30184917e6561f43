"""Work items over workers: what no schedule can beat, and what giving the longest first comes to."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.simulation.strips import Int64

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Items:
    """`times[i]` items that take `size[i]`, the longest first."""

    size: Float64
    times: Int64

    @property
    def total(self) -> float:
        """The total time of all items."""
        return float((self.size * self.times).sum())

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.times.sum())

    @property
    def longest(self) -> float:
        """The longest of them."""
        return float(self.size[0]) if len(self.size) else 0.0


def items(size: Float64, times: Int64) -> Items:
    """Items, put in order."""
    order = np.argsort(-size, kind="stable")
    return Items(size[order].astype(np.float64), times[order])


def least_time(work: Items, workers: int) -> float:
    """Return the least time of the workers: the mean, or some worker's share of the items that are as long as one.

    Of N items that take s or more, some worker has ⌈N / workers⌉.
    """
    if not work.count:
        return 0.0
    rounds = -(-np.cumsum(work.times) // workers)
    return max(work.total / workers, float((rounds * work.size).max()))


def scheduled(work: Items, workers: int) -> Float64:
    """The time of every worker if each takes the longest item that is left whenever it is free.

    Of many items alike, all but the last round are given out evenly.
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
