"""Rates of a machine: measured, stored and read back; damaged or foreign rates are ignored."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attnc import MeasurementError
from attnc.compiler.planning.cpu_plan import PlanPiece, Strip, StripAxis, stretch, strip
from attnc.compiler.planning.rates import AMX, PLAIN, ROWS, PieceWork
from attnc.runtime.cli import main
from attnc.runtime.disk.store import store
from attnc.runtime.measuring import calibration, steady
from attnc.runtime.measuring.steady import MOST_ROUNDS, REPEATS, Steady
from attnc.runtime.planning import plausible, stored_rates


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "v1"


@pytest.fixture
def accept_every_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept every measurement: tests run beside others, so how busy the machine is must not decide here."""
    monkeypatch.setattr(steady, "AGREE", math.inf)
    monkeypatch.setattr(calibration, "DRIFT", math.inf)
    monkeypatch.setattr(plausible, "LEAST", {"DEFAULT": 0.0})


def test_default_rates_without_a_measurement() -> None:
    assert stored_rates.rates() in (AMX, PLAIN)
    assert stored_rates.rates_file() is None


@pytest.mark.usefixtures("accept_every_measurement")
def test_measured_rates_are_used(folder: Path) -> None:
    rates = calibration.measure()
    for table in rates.elements.values():
        for row in table:
            assert len(row) == len(ROWS)
            assert all(0 < x < 1e4 for x in row)
    assert stored_rates.save(rates)
    file = stored_rates.rates_file()
    assert file is not None
    assert list(folder.iterdir()) == [file]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert asdict(stored_rates.rates()) == asdict(rates)


def test_rates_belong_to_a_machine_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stored_rates.save(AMX)
    assert stored_rates.rates_file() is not None
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert stored_rates.rates_file() is None
        assert stored_rates.measured() is None
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(stored_rates, "this_cpu", lambda: "another one")
    assert stored_rates.measured() is None


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
        {"spread": "narrow"},
    ],
)
def test_invalid_rates_are_ignored(change: dict[str, object]) -> None:
    record = {"schema": stored_rates.SCHEMA, "machine": "", **asdict(AMX)}
    store().write(stored_rates.KIND, stored_rates.entry_name(), record)
    assert asdict(stored_rates.rates()) == asdict(AMX)
    store().write(stored_rates.KIND, stored_rates.entry_name(), {**record, **change})
    stored_rates.forget()
    assert stored_rates.measured() is None
    assert stored_rates.rates() in (AMX, PLAIN)


@pytest.mark.usefixtures("accept_every_measurement")
def test_doctor(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "`attnc doctor --measure` writes it" in out
    assert re.search(r"^islpy +\d", out, re.MULTILINE)
    assert not folder.exists()
    assert main(["doctor", "--measure", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rates"].startswith("measured with")
    assert facts["rates_file"] == str(stored_rates.rates_file())
    assert str(folder) in facts["rates_file"]
    assert len(facts["ns_per_score_element"]["float32"]["64"]) == len(ROWS)


def test_doctor_reports_that_rates_were_not_stored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(calibration, "measure", lambda: replace(AMX, source="measured with two threads"))
    assert main(["doctor", "--measure"]) == 1
    out = capsys.readouterr().out
    assert "the measured rates are not stored" in out
    assert "measured with" in out


# --- a busy machine --------------------------------------------------------------------------------------------------


def clock(samples: Iterable[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let successive runs take these numbers of nanoseconds."""
    now, durations = [0], iter(samples)

    def tick() -> int:
        begins = len(now) % 2 == 1
        now.append(now[-1] if begins else now[-1] + next(durations))
        return now[-1]

    monkeypatch.setattr(steady, "time", SimpleNamespace(perf_counter_ns=tick))


def test_rounds_are_repeated_until_their_minima_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight samples of a quiet machine suffice; four slow samples at first cost a further round and change nothing."""
    clock([103, 100, 180, 170, 900, 105, 400, 300], monkeypatch)
    quiet = Steady()
    assert quiet(lambda: None) == 100
    assert quiet.spread == pytest.approx(1.05)
    clock([1000, 1100, 1200, 1300, 103, 100, 180, 170, 900, 105, 400, 300], monkeypatch)
    busy = Steady()
    assert busy(lambda: None) == 100
    assert busy.spread == pytest.approx(1.05)


def test_minima_that_never_agree_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [[int(1000 * 1.2**number)] * REPEATS for number in range(MOST_ROUNDS)]
    clock(itertools.chain(*rounds), monkeypatch)
    with pytest.raises(MeasurementError, match=r"in 12 rounds .* within 10% .*\(1.0 and 1.2 µs\).*measure again"):
        Steady()(lambda: None)


def test_doctor_stores_nothing_on_a_busy_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    clock((int(1e6 * 1.2 ** (number // REPEATS % MOST_ROUNDS)) for number in itertools.count()), monkeypatch)
    assert main(["doctor", "--measure"]) == 2
    assert "the machine is too busy to be measured" in capsys.readouterr().err
    assert not folder.exists()


def rates_at(speed: float) -> dict[str, tuple[float, float]]:
    """Return rates at which long dense calls reach `speed` GFLOP/s per thread."""
    element = 4 * 64 / (speed * min(torch.get_num_threads(), os.cpu_count() or 1))
    return {"float32": (element, 2 * element)}


@pytest.mark.parametrize(("speed", "says"), [(0.4, "too slow"), (5000.0, "too fast")])
def test_impossible_rates_are_not_used(
    speed: float, says: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stored_rates.save(replace(AMX, peak=rates_at(20.0), source="measured, good"))
    assert stored_rates.rates().source == "measured, good"
    assert stored_rates.save(replace(AMX, peak=rates_at(speed), source="measured under load"))
    with caplog.at_level(logging.WARNING):
        assert stored_rates.rates() in (AMX, PLAIN)
    (record,) = caplog.records
    assert says in record.getMessage()
    assert "attnc doctor --measure" in record.getMessage()
    assert main(["doctor"]) == 0
    assert "measured under load" not in capsys.readouterr().out


def test_measured_rates_must_be_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_peak", lambda *_: 1.0)
    monkeypatch.setattr(calibration, "_measured", lambda _: replace(AMX, peak=rates_at(0.1)))
    with pytest.raises(MeasurementError, match=r"too busy .* GFLOP/s of a thread in fp32 is too slow"):
        calibration.measure()
    peaks = iter([1.0, 1.6])
    monkeypatch.setattr(calibration, "_peak", lambda *_: next(peaks))
    with pytest.raises(MeasurementError, match=r"took 1 ns at the start and 1.6 ns at the end"):
        calibration.measure()


def test_the_spread_is_stored() -> None:
    assert stored_rates.save(replace(AMX, peak=rates_at(20.0), spread=1.07))
    assert stored_rates.rates().spread == 1.07


# --- costs ------------------------------------------------------------------------------------------------------------


def test_costs() -> None:
    """More heads, rows, masks, merges and copies cost more; other head dimensions cost between the measured ones."""
    work = PieceWork("float32", 64, 4, 8)
    plain = PlanPiece(strip(0, 64, 8, 64), strip(0, 64, 8, 256), "full")
    cost = AMX.piece(plain, work)
    assert cost > AMX.call
    assert AMX.piece(plain, PieceWork("float32", 64, 8, 8)) > cost
    assert AMX.piece(plain, PieceWork("float32", 128, 4, 8)) > AMX.piece(plain, PieceWork("float32", 96, 4, 8)) > cost
    assert AMX.piece(PlanPiece(plain.queries, plain.keys, 0), work) > cost
    assert AMX.piece(PlanPiece(plain.queries, plain.keys, "exact"), work) > AMX.piece(
        PlanPiece(plain.queries, plain.keys, 0), work
    )
    assert AMX.piece(PlanPiece(plain.queries, plain.keys, "full", fresh=False), work) > cost
    bricks = Strip(0, (StripAxis(512, 8, 8, 64), StripAxis(0, 1, 8)))
    assert AMX.piece(PlanPiece(bricks, plain.keys, "full"), work) > cost
    for n, less in ((512, False), (1024, True)):  # up to 512 keys the kernel skips no block
        causal, full = (AMX.piece(PlanPiece(stretch(0, n), stretch(0, n), mask), work) for mask in ("causal", "full"))
        assert (causal < full) == less
