"""Kernels in Triton's interpreter.

Triton decides when it is imported whether its own functions are interpreted, and when ours are decorated whether these
are. So it is imported here with TRITON_INTERPRET=1, which then is set while a test of this folder runs and at no other
time: tests elsewhere, in the same worker or in a process of theirs, do not see it. A test that compiles for a GPU needs
a process of its own whose environment has no TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


def _import_interpreted() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language as tl

        if type(tl.sum).__name__ != "InterpretedFunction":
            raise pytest.UsageError("triton was imported before tests/runtime/gpu: its functions are not interpreted")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if importlib.util.find_spec("triton"):
    _import_interpreted()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of this test run in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
