"""The tiers of the test suite: which tests are short, and how long the suite took when last measured.

`all` is every test. `short` keeps of each parametrised test one case in `ONE_IN`, at least one, drawn by a checksum of
its name, so that the cases of a matrix spread over both of its sides; it leaves out tests marked `slow`; and it keeps
the cases of kernels in the interpreter that `tests/short_tier.json` names, one for each kind of emitted text.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import settings

TESTS = Path(__file__).parents[1]
DURATIONS = TESTS / "durations.json"
KINDS = TESTS / "short_tier.json"
ONE_IN = 6
ALL_EXAMPLES, SHORT_EXAMPLES = 50, 10
"""Examples of a property drawn by hypothesis, in all tests and in the short tier."""
MOST_SECONDS = 20
"""Maximum seconds of a test of the short tier on a quiet machine."""
LISTED = 50


@cache
def kept_cases() -> frozenset[str]:
    """Return the names of the cases that the short tier keeps for the kinds of kernel text."""
    return frozenset(json.loads(KINDS.read_text(encoding="utf-8"))["cases"])


def function_of(name: str) -> str:
    """Return the name of a test without its parameters."""
    return name.partition("[")[0]


def plain_name(name: str) -> str:
    """Return the name of a test without the group that xdist appends, so that every way to run it gives one name."""
    return name.rpartition("@")[0] if name.rfind("@") > name.rfind("]") else name


def short_names(names: Iterable[str]) -> set[str]:
    """Return the names of the tests in the short tier, except slow ones."""
    cases = defaultdict(list)
    for name in names:
        cases[function_of(name)].append(name)
    short = set()
    for listed in cases.values():
        count = math.ceil(len(listed) / ONE_IN)
        short |= {*sorted(listed, key=lambda name: crc32(name.encode()))[:count]}
        short |= {name for name in listed if name in kept_cases()}
    return short


def split(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the tests of the short tier and the others, both in their original order."""
    quick = [item for item in items if item.get_closest_marker("slow") is None]
    short = short_names(plain_name(item.nodeid) for item in quick)
    kept = [item for item in quick if plain_name(item.nodeid) in short]
    chosen = {id(item) for item in kept}
    return kept, [item for item in items if id(item) not in chosen]


def announcement(tier: str) -> str:
    """Return a line about a tier's run, with the time that it took when measured."""
    what = {
        "short": f"one case in {ONE_IN} of each test, {SHORT_EXAMPLES} examples of each property (make test-all: all)",
        "all": "every test",
    }[tier]
    measured = json.loads(DURATIONS.read_text(encoding="utf-8")).get(tier) if DURATIONS.exists() else None
    if measured is None:
        return f"tier {tier}: {what}"
    minutes = measured["seconds"] / 60
    took = f"{measured['tests']:,} tests in {minutes:.0f} minutes on {measured['cores']} cores"
    return f"tier {tier}: {what}; {took}, measured {measured['date'][:10]}"


def examples(count: int) -> int:
    """Return how many examples the tier draws of a property that has `count` in all tests."""
    return max(1, count * settings().max_examples // ALL_EXAMPLES)


class Durations:
    """Times of the tests of a run by name, written to `durations.json` if requested."""

    def __init__(self, tier: str, started: float) -> None:
        self.tier, self.started = tier, started
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the time of a phase of a test; pytest calls this."""
        self.seconds[plain_name(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Write the tier's totals, the seconds of each folder and the slowest tests; pytest calls this."""
        measured: dict[str, Any] = json.loads(DURATIONS.read_text(encoding="utf-8")) if DURATIONS.exists() else {}
        measured[self.tier] = self._totals(time.monotonic())
        folders: dict[str, float] = defaultdict(float)
        for name, seconds in self.seconds.items():
            folders[name.partition("::")[0].rpartition("/")[0]] += seconds
        measured[f"folders_{self.tier}"] = {
            name: round(folders[name]) for name in sorted(folders, key=folders.__getitem__)
        }
        slowest = sorted(self.seconds.items(), key=lambda pair: -pair[1])[:LISTED]
        measured[f"slowest_{self.tier}"] = {name: round(seconds, 1) for name, seconds in slowest}
        DURATIONS.write_text(json.dumps(dict(sorted(measured.items())), indent=2) + "\n", encoding="utf-8")

    def _totals(self, now: float) -> Mapping[str, object]:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TESTS, capture_output=True, text=True, check=False)
        return {
            "tests": len(self.seconds),
            "seconds": round(now - self.started),
            "cores": os.cpu_count(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": head.stdout.strip(),
        }
