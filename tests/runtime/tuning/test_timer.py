"""The timer finds the fastest of several runs: in turn, by a sign test."""

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
    """All in every round until one is hopeless; nothing past the moment; what is not warm is not measured."""
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

    def warm(name: str, run: Callable[[], object]) -> bool:
        warmed.append(name)
        return name != "skipped"

    runs["skipped"] = lambda: order.append("skipped")
    found = compared(runs, Clock(torch.device("cpu")), float("inf"), warm)
    assert warmed == ["a", "b", "c", "skipped"]
    assert "skipped" not in order
    assert {name: set(own) for name, own in found.items()} == {"a": {3.0}, "b": {1.0}, "c": {9.0}}
    assert {name: len(own) for name, own in found.items()} == {"a": timer.MOST, "b": timer.MOST, "c": 3}
    assert order[:9] == ["a", "b", "c", *"bca", *"cab"]
    assert list(compared(runs, Clock(torch.device("cpu")), 0.0, warm)) == ["a"]
    times |= {"a": 3000.0, "b": 1000.0}
    soon = time.perf_counter() + 45.5  # seven rounds of a, and of what is as slow, take 42 s; with b besides 49 s
    assert list(compared(runs, Clock(torch.device("cpu")), soon, warm)) == ["a", "b"]


def test_alike_is_not_faster() -> None:
    """Equal runs are told apart once in a hundred at most, however noisy the machine is."""
    draw = random.Random(0)
    wrong = 0
    for _ in range(2000):
        drift = [draw.choice((1.0, 1.0, 3.0)) for _ in range(25)]
        one, other = ([x * draw.lognormvariate(0, 0.3) for x in drift] for _ in range(2))
        wrong += is_faster(one, other)
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
