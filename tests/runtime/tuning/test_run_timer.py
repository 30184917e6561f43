"""The timer finds the fastest of several runs: it measures them in turn and compares them with a sign test."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from attnc.runtime.tuning import timer
from attnc.runtime.tuning.timer import Clock, compared, is_faster


def test_runs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All run in each round until one is clearly slower; nothing runs past the deadline, no cold run is measured."""
    order: list[str] = []
    times = {"a": 3.0, "b": 1.0, "c": 9.0}
    names: dict[Any, str] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name in times:
        runs[name] = partial(order.append, name)
        names[runs[name]] = name

    def milliseconds(self: Clock, run: Any) -> float:
        run()
        return times[names[run]]

    monkeypatch.setattr(timer.Clock, "milliseconds", milliseconds)
    warmed: list[str] = []

    def warm_up(name: str, run: Callable[[], object]) -> bool:
        warmed.append(name)
        return name != "skipped"

    runs["skipped"] = lambda: order.append("skipped")
    times_by_name = compared(runs, Clock(torch.device("cpu")), float("inf"), warm_up)
    assert warmed == ["a", "b", "c", "skipped"]
    assert "skipped" not in order
    assert {name: set(run_times) for name, run_times in times_by_name.items()} == {"a": {3.0}, "b": {1.0}, "c": {9.0}}
    assert {name: len(run_times) for name, run_times in times_by_name.items()} == {
        "a": timer.MOST,
        "b": timer.MOST,
        "c": 3,
    }
    assert order[:9] == ["a", "b", "c", *"bca", *"cab"]
    assert list(compared(runs, Clock(torch.device("cpu")), 0.0, warm_up)) == ["a"]
    times |= {"a": 3000.0, "b": 1000.0}
    soon = time.perf_counter() + 45.5  # seven rounds of a and an equally slow run: 42 s; with b: 49 s
    assert list(compared(runs, Clock(torch.device("cpu")), soon, warm_up)) == ["a", "b"]


def test_equal_runs_are_not_faster() -> None:
    """Equal runs are declared different at most once in a hundred times, however noisy the machine is."""
    draw = random.Random(0)
    wrong = 0
    for _ in range(2000):
        drift = [draw.choice((1.0, 1.0, 3.0)) for _ in range(25)]
        first, second = ([x * draw.lognormvariate(0, 0.3) for x in drift] for _ in range(2))
        wrong += is_faster(first, second)
    assert wrong <= 30
    assert is_faster([0.9] * 7, [1.0] * 7)
    assert not is_faster([0.9] * 6, [1.0] * 6)
    assert not is_faster([0.9] * 6 + [1.1], [1.0] * 7)
    assert is_faster([0.9] * 22 + [1.1] * 3, [1.0] * 25)


def test_the_clock_flushes_and_measures() -> None:
    clock = Clock(torch.device("cpu"))
    clock._flushed.fill_(1)
    assert clock.milliseconds(lambda: None) < 50
    assert int(clock._flushed.max()) == 0
