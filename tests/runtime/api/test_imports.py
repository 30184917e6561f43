"""A process imports kernels, recurrences, tuning and simulation only when its calls need them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

USED = """
import sys, torch
from attnc import compile_attention
q = torch.randn(1, 2, 16, 8)
attend = compile_attention({name!r})
{use}
print(*sys.modules)
"""
LATE = {
    "attnc.compiler.growth",
    "attnc.compiler.kernels.attention_kernels",
    "attnc.compiler.recurrences",
    "attnc.compiler.simulation",
    "attnc.runtime.executors.recurrent",
    "attnc.runtime.simulate.simulating",
    "attnc.runtime.tuning.knobs",
    "torch._inductor",
}
SOURCE = Path(__file__).resolve().parents[3] / "src"


def imported(name: str, use: str) -> set[str]:
    command = [sys.executable, "-c", USED.format(name=name, use=use)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return {*subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()}


def test_a_pattern_on_a_cpu_imports_none_of_them() -> None:
    assert not imported("sliding_window", "attend(q, q, q)") & LATE


@pytest.mark.parametrize("name", ["retention", "hybrid_window_linear"])
def test_recurrences_are_imported_with_a_pattern_that_has_states(name: str) -> None:
    assert "attnc.runtime.executors.recurrent" in imported(name, "attend.derivation()")
