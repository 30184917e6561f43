"""Every part for a GPU at toy size, in Triton's interpreter, and what is read of its rows."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the kernels of these parts need triton", allow_module_level=True)

import all_goals
import benchmark_part
import causes
import goals
import gpu_suites
import reading
import report
import suites
import torch
from benchmark_part import Part, Row, Setting
from gpu_parts import rounds_for

pytestmark = [pytest.mark.xdist_group("gpu_parts")]

Result = Callable[[Part], Row]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy")


@pytest.fixture
def result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """The file of a part, run once."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def found(one: Part) -> Row:
        out = folder / f"{one.name}.json"
        if not out.exists():
            torch.manual_seed(0)
            assert benchmark_part.run(one, Setting("cpu", toy=True), out) == benchmark_part.FINE
        read: Row = json.loads(out.read_text(encoding="utf-8"))
        return read

    return found


@pytest.mark.parametrize("one", gpu_suites.PARTS, ids=lambda one: one.name)
def test_a_part(one: Part, result: Result) -> None:
    found = result(one)
    assert found["complete"] and found["rows"]
    for row in found["rows"]:
        assert row.get("ok", True)
        assert all(time["median"] > 0 for time in row.get("ms", {}).values())
        assert all(reason for reason in row.get("absent", {}).values())


def test_parts_are_shorter_than_nine_minutes_and_have_suites() -> None:
    assert all(0 < one.minutes < 9 for one in gpu_suites.PARTS)
    assert {one.suite for one in gpu_suites.PARTS} == set(suites.SUITES)
    assert len({one.name for one in gpu_suites.PARTS}) == len(gpu_suites.PARTS)
    assert [one.suite for one in gpu_suites.PARTS[:8]] == ["correct"] * 8


def test_a_part_goes_on_where_it_was_stopped(result: Result) -> None:
    one = next(one for one in gpu_suites.PARTS if one.name == "gpu-windows-text")
    rows = result(one)["rows"]
    left = one.rows(Setting("cpu", toy=True, done=frozenset(row["key"] for row in rows[:-1])))
    assert [row["key"] for row in left] == [rows[-1]["key"]]


SPARSE = ("gpu-windows-text", "gpu-blocks-video", "gpu-blocks-other")


@pytest.mark.parametrize("name", SPARSE)
def test_rows_hold_what_goals_need(name: str, result: Result) -> None:
    one = next(one for one in gpu_suites.PARTS if one.name == name)
    for row in result(one)["rows"]:
        assert {"out", "dq", "dk", "dv"} == row["errors"].keys()
        assert {"attnc", "attnc_dense", "flex", "sdpa_flash"} <= row["ms"].keys()
        assert {"natten", "flash_attention", "sdpa_cudnn"} == row["absent"].keys()
        assert 0 < row["density"] <= 1 + 1e-9 and row["bound"] > 0 and row["of_bound"] > 0 and row["of_dense_rate"] > 0
        assert row["predicted"]["attnc"] > 0


NEED_RIVALS = {
    "G1a.dense",
    "G1b.natten",
    "G1b.natten.permuted",
    "G1c.natten.1D",
    "G1c.natten.FLUX",
    "G1c.natten.Hunyuan",
    "G2.dense",
    "G3.dense",
    "G4.fla",
    "G4.fla.few",
    "G4.lightning",
    "G4.ssd",
    "G4b.fla",
    "G4b.least",
    "G5.nsa",
    "G5.nsa.backward.32K",
    "G5.nsa.backward.128K",
}
"""Goals that no row of toy size decides: the rival is not here, and what was published is of other sizes."""

NEED_A_GPU = {
    "G1c.bound.full",
    "G2.flex",
    "G3.copy",
    "G3.graph",
    "G3.sparse",
    "G4.memory",
    "G4.tokens",
    "G5.dense",
    "G6.flex",
    "G6.flex.eager",
    "G6.kernels",
    "G6.memory",
    "G6.million",
    "G6.million.memory",
    "G6.share",
    "G6.share.8K",
    "G6.waits",
}
"""Goals of sizes, of graphs, of a profiler or of gradients of FlexAttention, which only a GPU has."""


@pytest.mark.slow
def test_every_goal_reads_these_rows(folder: Path, result: Result) -> None:
    for one in gpu_suites.PARTS:
        result(one)
    rows = reading.rows(reading.load(folder))
    asked = [goal for goal in all_goals.GOALS if goal.where == "gpu"]
    assert {name for goal in asked for name in goal.parts} <= {one.name for one in gpu_suites.PARTS}
    verdicts = {goal.key: goals.verdict(goal, rows, causes.why) for goal in asked}
    assert len(verdicts) == len(asked)
    assert all(one.line() and not one.wrong for one in verdicts.values())
    missing = {key for key, one in verdicts.items() if one.word == "not measured here"}
    assert missing == NEED_RIVALS | NEED_A_GPU


@pytest.mark.slow
def test_the_report_shows_these_rows(folder: Path, result: Result) -> None:
    for one in gpu_suites.PARTS:
        result(one)
    page = report.page(folder)
    assert all(escape(f"{one.name}: {one.description}") in page for one in gpu_suites.PARTS)
    assert all(title in page for title in ("GPU: speed over", "GPU: predicted", "GPU: selected keys"))
    assert "natten: NATTEN is not installed" in page and "flash_attention: FlashAttention is not installed" in page


def test_rounds_follow_from_time() -> None:
    assert rounds_for(0.001) == 50
    assert rounds_for(10_000) == 7
    assert 7 < rounds_for(300) < 50
