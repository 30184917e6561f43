"""The script for GPUs at toy sizes, in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


PARTS = [("gpu_check", "correct", 30), ("gpu_check", "decode", 2), ("gpu_trust", "tune", 1), ("gpu_trust", "memory", 6)]


@pytest.mark.parametrize(("script", "part", "count"), PARTS)
def test_parts(script: str, part: str, count: int, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), part, "--toy", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(out.read_text(encoding="utf-8"))
    assert {"torch", "triton", "commit", "device", "date", "command"} <= facts.keys()
    assert len(facts["rows"]) == count
    assert all(row["ok"] for row in facts["rows"])
