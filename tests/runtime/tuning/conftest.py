"""A cache folder for each test, a record of measured runs, and a clock with times that the test sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attnc.runtime.choices.records import MODEL
from attnc.runtime.tuning import timer
from attnc.runtime.tuning import tuner as tuning
from attnc.runtime.tuning.timer import Clock


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "v1"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the name of the measured pattern at each measurement."""
    names: list[str] = []
    real = tuning._measured

    def recording_measured(call: Any, *args: Any) -> Any:
        names.append(call.name)
        return real(call, *args)

    monkeypatch.setattr(tuning, "_measured", recording_measured)
    return names


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, float]], None]]:
    """Set times instead of measuring them, for options whose text contains a key; every other option takes 1 ms.

    The key `other` sets the time of all other options but the model's choice.
    """
    times: dict[str, float] = {}

    def time_of_option(option: str) -> float:
        matching_times = (ms for part, ms in times.items() if part in option)
        return next(matching_times, 1.0 if option == MODEL else times.get("other", 1.0))

    def milliseconds(self: Clock, run: Any) -> float:
        run()
        (choices,) = run.args
        return max(sum(time_of_option(option) for _, option in choices), 1e-3)

    monkeypatch.setattr(timer.Clock, "milliseconds", milliseconds)

    def set_times(new_times: dict[str, float]) -> None:
        times.clear()
        times.update(new_times)

    yield set_times
