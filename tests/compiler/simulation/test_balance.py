"""Work items over workers: the lower bound of every schedule, and the schedule that starts with the longest item."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.simulation.balance import Items, items, least_time, scheduled
from tiers import examples


def work_of(sizes: list[int]) -> Items:
    distinct, times = np.unique(np.array(sizes, dtype=np.int64), return_counts=True)
    return items(distinct.astype(np.float64), times)


def best(sizes: list[int], workers: int) -> int:
    """Find the least possible time by trying every assignment."""
    return min(
        max(sum(s for s, w in zip(sizes, who, strict=True) if w == worker) for worker in range(workers))
        for who in itertools.product(range(workers), repeat=len(sizes))
    )


def longest_first(sizes: list[int], workers: int) -> list[int]:
    loads = [0] * workers
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return sorted(loads, reverse=True)


@settings(max_examples=examples(150))
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_between_the_best_and_four_thirds_of_it(sizes: list[int], workers: int) -> None:
    exact = best(sizes, workers)
    found = work_of(sizes)
    assert least_time(found, workers) <= exact
    assert exact <= scheduled(found, workers)[0] <= exact * (4 / 3 - 1 / (3 * workers)) + 1e-9


@given(st.lists(st.integers(1, 9), max_size=300), st.integers(1, 9))
def test_equal_items_are_assigned_as_well_in_bulk_as_one_by_one(sizes: list[int], workers: int) -> None:
    found = work_of(sizes)
    loads = scheduled(found, workers)
    assert loads.sum() == pytest.approx(sum(sizes))
    assert len(loads) == workers and sorted(loads.tolist(), reverse=True) == loads.tolist()
    assert least_time(found, workers) <= loads[0] <= longest_first(sizes, workers)[0] + max(sizes, default=0)


@pytest.mark.parametrize(
    ("count", "workers", "least"), [(132, 132, 5.0), (133, 132, 10.0), (264, 132, 10.0), (1, 132, 5.0), (0, 132, 0.0)]
)
def test_waves_of_equal_items(count: int, workers: int, least: float) -> None:
    items = work_of([5] * count)
    assert least_time(items, workers) == least
    assert scheduled(items, workers)[0] == least


def test_one_long_item_decides() -> None:
    assert least_time(work_of([100, 1, 1, 1]), 4) == 100
