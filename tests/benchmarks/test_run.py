"""`benchmarks/run.py`: a process for each part, what is there is left, what has no time waits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import run
import suites
import timing
import torch
from benchmark_part import Setting


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    return tmp_path / "toy"


def test_a_suite(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["cpu", "--suite", "dense", "--toy", "--json", "--html", str(results.parent / "page.html")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["part"], one["ended"], one["rows"]) for one in told["parts"]] == [("cpu-dense", "complete", 2)]
    assert {one["goal"] for one in told["goals"]} == {"dense.flex", "dense.sdpa"}
    assert all(one["verdict"] in ("ahead", "behind") for one in told["goals"])
    assert "cpu-dense" in (results.parent / "page.html").read_text(encoding="utf-8")
    assert run.main(["cpu", "--suite", "dense", "--toy"]) == 0
    assert "was complete" in capsys.readouterr().err


def test_no_time(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["cpu", "--toy", "--budget", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["ended"] for one in told["parts"]} == {"not begun"}
    assert {one["verdict"] for one in told["goals"]} == {"not measured here"}
    assert not results.exists()


def test_time_that_ends_in_a_part() -> None:
    _, part = suites.find("cpu-recurrence")
    status, said = run._process(part, Setting("cpu", toy=True), 0.5, lambda text: None, fresh=False)
    assert status is None, said


def test_a_part_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "_process", lambda *_, **__: (1, "Traceback: what went wrong"))
    assert run.main(["cpu", "--suite", "dense", "--toy"]) == 1
    said = capsys.readouterr().err
    assert "failed" in said and "what went wrong" in said


def test_list_and_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["cpu", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(suites.CPU)
    if not torch.cuda.is_available():
        assert run.main(["gpu", "--suite", "windows"]) == 2
        assert "--toy" in capsys.readouterr().err
