"""The script that times recurrences on GPUs, at toy sizes, in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu_recurrence.py"


def rows(part: str, folder: Path) -> list[dict[str, Any]]:
    out = folder / "rows.json"
    command = [sys.executable, str(SCRIPT), part, "--toy", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(out.read_text(encoding="utf-8"))
    assert {"torch", "triton", "commit", "device", "date", "command", "fla", "means"} <= facts.keys()
    found: list[dict[str, Any]] = facts["rows"]
    return found


def test_results_are_right(tmp_path: Path) -> None:
    found = rows("correct", tmp_path)
    assert [row["what"] for row in found] == ["whole", "kernels"] * 4
    assert all(row["ok"] and "dq" in row["errors"] for row in found)


@pytest.mark.parametrize(("part", "count"), [("training", 4), ("step", 4)])
def test_timings(part: str, count: int, tmp_path: Path) -> None:
    found = rows(part, tmp_path)
    assert len(found) == count
    assert all(row["kernels"]["median"] > 0 and row["whole"]["rounds"] == 1 for row in found)


def test_splits(tmp_path: Path) -> None:
    found = rows("split", tmp_path)
    assert [row["training"] for row in found] == [False, True] * 4
    assert all(row["ok"] and {"rule", "whole", "in 2"} <= row["differences"].keys() for row in found)


def test_a_step_equation_without_chunks(tmp_path: Path) -> None:
    (found,) = rows("tokens", tmp_path)
    assert found["system"] == "yaad_linear" and found["ok"]
    assert found["us_a_token"] > 0 and found["training"]["median"] > 0


def test_means_leave_out_what_stands_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_recurrence as script

    given: list[dict[str, object]] = [
        {"system": "gla", "fla_over_kernels": 2.0, "shape": [1, 2, 3, 4]},
        {"system": "gla", "fla_over_kernels": 8.0, "shape": [1, 2, 3, 5]},
        {"system": "gla", "fla_over_kernels": 100.0, "shape": script.APART},
        {"system": "retention", "fla_over_kernels": 0.5, "shape": [1, 2, 3, 4]},
        {"system": "retention", "shape": [1, 2, 3, 4]},
    ]
    assert script.means(given) == {"gla": 4.0, "all": 2.0, "retention": 0.5}
    assert script.published_bytes_per_ms("NVIDIA H100 80GB HBM3") == pytest.approx(3.35e9)
    assert script.published_bytes_per_ms("a GPU of tomorrow") is None
