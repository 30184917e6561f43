"""The small version of `make soak`: the same code with fewer processes, kills and calls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


@pytest.mark.parametrize("part", ["processes", "kills", "shapes"])
def test_soak(part: str) -> None:
    done = subprocess.run([sys.executable, str(SOAK), "--small", part], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout)
    assert row["failures"] == []
    if part == "processes":
        assert row["calls"] == row["processes"] * 10
        assert row["tuned"] == row["entries"] > 0, "each bucket is tuned by one of the processes"
        assert row["left_over"] == 0
    if part == "kills":
        assert row["entries_served"] > row["kills"]
        assert row["writes_cut_short"] > 0
    if part == "shapes":
        assert row["kernels_launched"] == row["variants_launched"] > 0
