"""A cache folder for each test, the runs that were measured, and a clock that is told the times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attnc.runtime.tuning import timer
from attnc.runtime.tuning import tuner as tuning
from attnc.runtime.tuning.records import MODEL
from attnc.runtime.tuning.timer import Clock


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "v1"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of patterns that were measured, each as often as it was."""
    found: list[str] = []
    real = tuning._measured

    def noted(call: Any, *args: Any) -> Any:
        found.append(call.name)
        return real(call, *args)

    monkeypatch.setattr(tuning, "_measured", noted)
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, float]], None]]:
    """Times that are told, not measured, by a piece of the text of an option; the model's choice takes 1 ms, and so do
    others unless `other` says it.
    """
    times: dict[str, float] = {}

    def of_option(option: str) -> float:
        told = (ms for part, ms in times.items() if part in option)
        return next(told, 1.0 if option == MODEL else times.get("other", 1.0))

    def milliseconds(self: Clock, run: Any) -> float:
        run()
        (choices,) = run.args
        return max(sum(of_option(option) for _, option in choices), 1e-3)

    monkeypatch.setattr(timer.Clock, "milliseconds", milliseconds)

    def tell(told: dict[str, float]) -> None:
        times.clear()
        times.update(told)

    yield tell
