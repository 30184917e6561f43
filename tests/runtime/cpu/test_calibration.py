"""Rates of a machine: measured, kept, read back; what is damaged or foreign is as good as none."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from attnc.compiler.planning.plan import Piece, Steps, Strip, stretch, strip
from attnc.compiler.planning.rates import AMX, PLAIN, ROWS, Work
from attnc.runtime.cli import main
from attnc.runtime.cpu import calibration
from attnc.runtime.disk.store import store


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "v1"


def test_a_guess_where_nothing_was_measured() -> None:
    assert calibration.rates() in (AMX, PLAIN)
    assert calibration.rates_file() is None


def test_what_was_measured_is_used(folder: Path) -> None:
    found = calibration.measure()
    for table in found.elements.values():
        for row in table:
            assert len(row) == len(ROWS)
            assert all(0 < x < 1e4 for x in row)
    assert calibration.save(found)
    file = calibration.rates_file()
    assert file is not None
    assert list(folder.iterdir()) == [file]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert asdict(calibration.rates()) == asdict(found)


def test_rates_belong_to_a_machine_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibration.save(AMX)
    assert calibration.rates_file() is not None
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert calibration.rates_file() is None
        assert calibration.measured() is None
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(calibration, "this_cpu", lambda: "another one")
    assert calibration.measured() is None


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 99},
        {"call": "fast"},
        {"call": -1.0},
        {"elements": {"float32": [[1.0], [2.0]]}},
        {"elements": {}},
        {"more": 1},
        {"choices": {}},
    ],
)
def test_numbers_that_are_no_rates_are_as_good_as_none(change: dict[str, object]) -> None:
    whole = {"schema": calibration.SCHEMA, "machine": "", **asdict(AMX)}
    store().write(calibration.KIND, calibration.entry_name(), whole)
    assert asdict(calibration.rates()) == asdict(AMX)
    store().write(calibration.KIND, calibration.entry_name(), {**whole, **change})
    calibration.forget()
    assert calibration.measured() is None
    assert calibration.rates() in (AMX, PLAIN)


def test_doctor(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "attnc doctor --measure makes it" in out
    assert re.search(r"^islpy +\d", out, re.MULTILINE)
    assert not folder.exists()
    assert main(["doctor", "--measure", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rates"].startswith("measured with")
    assert facts["rates_file"] == str(calibration.rates_file())
    assert str(folder) in facts["rates_file"]
    assert len(facts["ns_per_score_element"]["float32"]["64"]) == len(ROWS)


def test_doctor_says_that_nothing_was_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "file"))
    assert main(["doctor", "--measure"]) == 1
    out = capsys.readouterr().out
    assert "what was measured is not kept" in out
    assert "measured with" in out


def test_costs() -> None:
    """More heads, rows, masks, merges and copies cost more; a head dimension between the known ones lies between."""
    work = Work("float32", 64, 4, 8)
    plain = Piece(strip(0, 64, 8, 64), strip(0, 64, 8, 256), "full")
    cost = AMX.piece(plain, work)
    assert cost > AMX.call
    assert AMX.piece(plain, Work("float32", 64, 8, 8)) > cost
    assert AMX.piece(plain, Work("float32", 128, 4, 8)) > AMX.piece(plain, Work("float32", 96, 4, 8)) > cost
    assert AMX.piece(Piece(plain.queries, plain.keys, 0), work) > cost
    assert AMX.piece(Piece(plain.queries, plain.keys, "exact"), work) > AMX.piece(
        Piece(plain.queries, plain.keys, 0), work
    )
    assert AMX.piece(Piece(plain.queries, plain.keys, "full", fresh=False), work) > cost
    bricks = Strip(0, (Steps(512, 8, 8, 64), Steps(0, 1, 8)))
    assert AMX.piece(Piece(bricks, plain.keys, "full"), work) > cost
    for n, less in ((512, False), (1024, True)):  # up to 512 keys the kernel leaves none out
        causal, full = (AMX.piece(Piece(stretch(0, n), stretch(0, n), mask), work) for mask in ("causal", "full"))
        assert (causal < full) == less
