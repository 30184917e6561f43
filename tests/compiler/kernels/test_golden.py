"""The forward text of five patterns, word for word, in `golden/*.py.txt`.

`ATTNC_UPDATE_GOLDEN=1 pytest tests/compiler/kernels/test_golden.py` writes what is emitted; read the difference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from attnc.compiler.kernels.kernels import Heads, find_kernels
from attnc.compiler.kernels.targets import TARGETS
from plan_calls import from_library

GOLDEN = Path(__file__).parent / "golden"

PATTERNS: Mapping[str, Mapping[str, object]] = {
    "causal": {},
    "sliding_window": {"window": 512, "sinks": 4},
    "document": {},
    "alibi": {},
    "power": {},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_forward(name: str) -> None:
    """For sm_90, heads of 64 in bf16."""
    kernels = find_kernels(from_library(name, **PATTERNS[name]), Heads(64, 64, "bfloat16"), TARGETS["sm_90"])
    path, text = GOLDEN / f"{name}.py.txt", kernels.forward.text
    if os.environ.get("ATTNC_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_no_golden_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.py.txt" for name in PATTERNS}
