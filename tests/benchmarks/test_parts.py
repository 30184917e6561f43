"""Parts keep what they have measured, wherever they are stopped, and go on after it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import benchmark_part
import pytest
import suites
import torch
from benchmark_part import FINE, ROOT, WRONG, KeyTwiceError, Part, Row, Setting

MADE_UP = Part("made-up", "plan", "made up", "made_up_rows:rows", 1)
HERE = Setting("cpu", toy=True)


class StoppedError(Exception):
    """As if somebody had stopped the part."""


class Rows(ModuleType):
    """A module whose `rows` gives rows in order, and stops where it is told to."""

    def __init__(self, *rows: Row) -> None:
        super().__init__("made_up_rows")
        self.given, self.stops_at, self.made = rows, "", list[str]()

    def rows(self, setting: Setting) -> Iterator[Row]:
        for row in self.given:
            if row["key"] == self.stops_at:
                raise StoppedError
            if row["key"] not in setting.done:
                self.made.append(row["key"])
                yield dict(row)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Rows:
    module = Rows({"key": "a"}, {"key": "b", "ok": True}, {"key": "c"})
    monkeypatch.setitem(sys.modules, "made_up_rows", module)
    return module


def _read(out: Path) -> Row:
    found: Row = json.loads(out.read_text(encoding="utf-8"))
    return found


def _keys(out: Path) -> list[str]:
    return [row["key"] for row in _read(out)["rows"]]


def test_goes_on_where_it_stopped(made_up: Rows, tmp_path: Path) -> None:
    out = tmp_path / "made-up.json"
    made_up.stops_at = "c"
    with pytest.raises(StoppedError):
        benchmark_part.run(MADE_UP, HERE, out)
    assert _keys(out) == ["a", "b"]
    assert not _read(out)["complete"]
    assert not benchmark_part.is_complete(MADE_UP, HERE, out)
    made_up.stops_at = ""
    assert benchmark_part.run(MADE_UP, HERE, out) == FINE
    assert made_up.made == ["a", "b", "c"]
    assert _keys(out) == ["a", "b", "c"]
    assert benchmark_part.is_complete(MADE_UP, HERE, out)
    assert list(tmp_path.iterdir()) == [out]


def test_fresh_measures_again(made_up: Rows, tmp_path: Path) -> None:
    out = tmp_path / "made-up.json"
    for _ in range(2):
        benchmark_part.run(MADE_UP, HERE, out, fresh=True)
    assert made_up.made == ["a", "b", "c"] * 2


@pytest.mark.parametrize("fact", benchmark_part.SAME)
def test_other_facts_begin_anew(made_up: Rows, tmp_path: Path, fact: str) -> None:
    out = tmp_path / "made-up.json"
    benchmark_part.run(MADE_UP, HERE, out)
    benchmark_part.write(out, _read(out) | {fact: "another"})
    assert not benchmark_part.is_complete(MADE_UP, HERE, out)
    assert benchmark_part.kept(out, benchmark_part.header(MADE_UP, HERE)) == []


def test_wrong_rows_are_told_and_tried_again(made_up: Rows, tmp_path: Path) -> None:
    out = tmp_path / "made-up.json"
    made_up.given[1]["ok"] = False
    assert benchmark_part.run(MADE_UP, HERE, out) == WRONG
    assert not benchmark_part.is_complete(MADE_UP, HERE, out)
    made_up.given[1]["ok"] = True
    assert benchmark_part.run(MADE_UP, HERE, out) == FINE
    assert made_up.made == ["a", "b", "c", "b"]


@pytest.mark.parametrize("second", [{"key": "a"}, {"key": ""}, {}])
def test_every_row_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, second: Row) -> None:
    module = ModuleType("made_up_rows")
    module.rows = lambda setting: iter([{"key": "a"}, second])  # type: ignore[attr-defined]  # a module of this test
    monkeypatch.setitem(sys.modules, "made_up_rows", module)
    with pytest.raises(KeyTwiceError):
        benchmark_part.run(MADE_UP, HERE, tmp_path / "made-up.json")


def test_a_part_without_rows_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "made_up_rows", Rows())
    with pytest.raises(ValueError, match="no rows"):
        benchmark_part.run(MADE_UP, HERE, tmp_path / "made-up.json")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "file.json"
    benchmark_part.write(out, {"rows": [1]})
    with pytest.raises(TypeError):
        benchmark_part.write(out, {"rows": [object()]})
    assert _read(out) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [out]


def test_a_part_that_is_killed_keeps_its_rows(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "part.py"), "cpu-plan", "--toy", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not (out.exists() and len(_keys(out)) >= 2) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, said
    before = _read(out)
    assert len(before["rows"]) >= 2 and not before["complete"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == FINE, done.stderr
    after = _read(out)
    assert after["complete"]
    assert after["rows"][: len(before["rows"])] == before["rows"]
    assert len(set(_keys(out))) == len(after["rows"]) > len(before["rows"])


def test_parts_have_names_suites_and_minutes() -> None:
    parts = [one for parts in suites.PARTS.values() for one in parts]
    assert len({one.name for one in parts}) == len(parts)
    assert {one.suite for one in parts} == set(suites.SUITES)
    assert {one.suite for one in suites.PARTS["cpu"]} == set(suites.SUITES) - {"correct"}
    assert all(0 < one.minutes < 9 for one in parts)
    assert all(suites.find(one.name)[1] is one for one in parts)
    with pytest.raises(KeyError):
        suites.find("no such part")


def test_a_gpu_is_asked_for_by_name() -> None:
    if torch.cuda.is_available():
        assert benchmark_part.setting_of("gpu", toy=False).cuda
    else:
        with pytest.raises(benchmark_part.NoDeviceError, match="--toy"):
            benchmark_part.setting_of("gpu", toy=False)
