"""The forward text of five patterns, and decode's of two, word for word, in `golden/*.py.txt`.

`ATTNC_UPDATE_GOLDEN=1 pytest tests/compiler/kernels/test_golden.py` writes what is emitted; read the difference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from attnc.compiler.kernels.attention_kernels import HeadShape, find_kernels
from attnc.compiler.kernels.decode_kernels import find_decode
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.last_rows import last_rows
from plan_calls import from_library

HEADS = HeadShape(64, 64, "bfloat16")
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
    kernels = find_kernels(from_library(name, **PATTERNS[name]), HEADS, TARGETS["sm_90"])
    check(name, kernels.forward.text)


DECODED = ("power", "sliding_window")
"""Keys that are listed, and bounds in the kernel."""


@pytest.mark.parametrize("name", DECODED)
def test_decode(name: str) -> None:
    """Kernels over pages, and the merging of partial results."""
    pattern = last_rows(from_library(name, **PATTERNS[name]))
    kernels = find_decode(pattern, HEADS, TARGETS["sm_90"], "pages")
    check(f"{name}_decode", f"{kernels.decode(16).text}\n\n{kernels.merge.text}")


def check(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.py.txt"
    if os.environ.get("ATTNC_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_no_golden_is_left_over() -> None:
    names = {*PATTERNS, *(f"{name}_decode" for name in DECODED)}
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.py.txt" for name in names}
