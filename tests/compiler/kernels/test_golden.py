"""Compare the forward kernels of five patterns, and the decode kernels of two, with the texts in `golden/*.py.txt`.

`ATTNC_UPDATE_GOLDEN=1 pytest tests/compiler/kernels/test_golden.py` writes the emitted texts; review the diff.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from attnc.compiler.kernels.attention_kernels import HeadShape, find_kernels
from attnc.compiler.kernels.decode_kernels import find_decode
from attnc.compiler.kernels.targets import TARGETS
from attnc.compiler.passes.last_rows import last_rows
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
    """The target is sm_90; heads have 64 elements in bf16."""
    kernels = find_kernels(from_library(name, **PATTERNS[name]), HEADS, TARGETS["sm_90"])
    check(name, kernels.forward.text)


DECODED = ("power", "sliding_window")
"""One pattern whose keys are listed, and one whose key bounds the kernel computes."""


@pytest.mark.parametrize("name", DECODED)
def test_decode(name: str) -> None:
    """Check the kernels over pages and the merge of partial results."""
    pattern = last_rows(from_library(name, **PATTERNS[name]))
    kernels = find_decode(pattern, HEADS, TARGETS["sm_90"], "pages")
    check(f"{name}_decode", f"{kernels.decode(16).text}\n\n{kernels.merge.text}")


def check(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.py.txt"
    if os.environ.get("ATTNC_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_golden_file_is_tested() -> None:
    names = {*PATTERNS, *(f"{name}_decode" for name in DECODED)}
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.py.txt" for name in names}
