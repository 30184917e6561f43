"""Files of verdicts on kernels: what is written is read, and every committed file can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kernel_verdicts
import provenance
import pytest
import timing

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
COMMON = {"target": "sm_90", "dtype": "bfloat16", "head_dim": 64}
TILES = {"tiles": "128x64", "warps": 8, "stages": 3}


def test_rows_are_read_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(provenance, "refuse_uncommitted", lambda: None)
    rows: list[dict[str, Any]] = [
        {**COMMON, "pattern": "a", "kernel": "dq", "verdict": "pass", "digest": "1f", **TILES, "reasons": []},
        {**COMMON, "pattern": "a", "kernel": "dq", "verdict": "fail", "digest": "2f", "reasons": ["12 spilled"]},
        {**COMMON, "pattern": "b", "kernel": None, "verdict": "none", "reasons": ["no product of vectors"]},
        {**COMMON, "head_dim": 96, "pattern": "a", "kernel": "dq", "verdict": "pass", "digest": "3f", "reasons": []},
    ]
    path = kernel_verdicts.save("kernels-x", rows, {"date": "today"})
    assert kernel_verdicts.read(path) == rows
    assert json.loads(path.read_text(encoding="utf-8"))["date"] == "today"
    assert path.read_text(encoding="utf-8").count('"a": ') == 2


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert kernel_verdicts.read(tmp_path / "none.json") == []


@pytest.mark.parametrize("path", sorted(RESULTS.glob("kernels-*.json")), ids=lambda path: path.stem)
def test_committed_files(path: Path) -> None:
    rows = kernel_verdicts.read(path)
    assert len(rows) > 100
    for row in rows:
        assert (row["verdict"] == "pass") == (not row["reasons"])
    assert path.stat().st_size < 250_000
