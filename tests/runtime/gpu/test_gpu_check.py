"""The script for GPUs at toy sizes, in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu_check.py"


@pytest.mark.parametrize(("part", "count"), [("correct", 30), ("decode", 2)])
def test_parts(part: str, count: int, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), part, "--toy", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(out.read_text(encoding="utf-8"))
    assert {"torch", "triton", "commit", "device", "date", "command"} <= facts.keys()
    assert len(facts["rows"]) == count
    assert all(row["ok"] for row in facts["rows"])
