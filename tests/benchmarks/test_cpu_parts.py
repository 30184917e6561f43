"""Every part for a CPU at toy sizes: its rows are right and hold what the goals and the report read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import suites
import torch
from benchmark_part import Part, Setting, is_wrong

from attnc.runtime.measuring import calibration, steady
from attnc.runtime.planning import plausible


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    """Nothing is compiled, and the cache's folder is what it was."""
    monkeypatch.setitem(os.environ, "ATTNC_CACHE_DIR", os.environ.get("ATTNC_CACHE_DIR", ""))
    monkeypatch.setattr(steady, "AGREE", math.inf)  # how busy the machine is decides nothing here
    monkeypatch.setattr(calibration, "DRIFT", math.inf)
    monkeypatch.setattr(plausible, "LEAST", {"DEFAULT": 0.0})
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("part", suites.CPU, ids=lambda part: part.name)
def test_toy_sizes(part: Part) -> None:
    rows = list(part.rows(Setting("cpu", toy=True)))
    keys = [row["key"] for row in rows]
    assert rows and len(set(keys)) == len(keys)
    assert not [row for row in rows if is_wrong(row)]
    times = [time for row in rows for time in row.get("ms", {}).values()]
    assert times and all(0 < time["low"] <= time["median"] <= time["high"] for time in times)
    assert list(part.rows(Setting("cpu", toy=True, done=frozenset(keys)))) == []
