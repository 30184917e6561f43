"""The sharing of tests between xdist's workers: by file, long files by function, and the longest first.

Tests of a file share what they compute: fixtures of the module, plans, kernels. xdist's `loadgroup` sends every test
on its own, so that each worker computes all of it, and its bookkeeping is quadratic in the number of units: 10 s of a
run of 14,000 tests. Short units come last, so that no worker ends alone. Groups named by a mark stay as they are.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
from xdist.scheduler import LoadGroupScheduling

from tiers import DURATIONS, function_of, plain_name

MOST_TESTS = 60
"""Number of tests of a file above which each of its functions is a unit."""
SECONDS = 0.15
"""Mean time of a test that is not among the slowest."""


def unit_of(name: str, large_files: frozenset[str]) -> str:
    """Return the unit of a test: its file, or its function in a large file."""
    file = name.partition("::")[0]
    return function_of(name) if file in large_files else file


def large_files(names: Iterable[str]) -> frozenset[str]:
    """Return the files with more than `MOST_TESTS` tests."""
    counts = Counter(name.partition("::")[0] for name in names)
    return frozenset(file for file, count in counts.items() if count > MOST_TESTS)


@cache
def slow_seconds() -> dict[str, float]:
    """Return the measured times of the slowest tests by name."""
    measured = json.loads(DURATIONS.read_text(encoding="utf-8")) if DURATIONS.exists() else {}
    seconds: dict[str, float] = measured.get("slowest_all", {})
    return seconds


def estimated_seconds(names: Iterable[str]) -> float:
    """Return an estimate of the time of some tests."""
    return sum(slow_seconds().get(plain_name(name), SECONDS) for name in names)


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Return xdist's scheduler of groups, with files and functions as units, the longest first."""
    made = LoadGroupScheduling(config, log)
    group_of, assign = made._split_scope, made._assign_work_unit
    large: frozenset[str] | None = None
    is_ordered = False

    def split(name: str) -> str:
        nonlocal large
        if large is None:
            large = large_files(next(iter(made.registered_collections.values())))
        group: str = group_of(name)
        return unit_of(name, large) if group == name else group

    def assign_longest(worker: Any) -> None:
        nonlocal is_ordered
        if not is_ordered:
            is_ordered = True
            made.workqueue = OrderedDict(sorted(made.workqueue.items(), key=lambda unit: -estimated_seconds(unit[1])))
        assign(worker)

    made._split_scope, made._assign_work_unit = split, assign_longest
    return made
