"""Kernels in Triton's interpreter.

Triton decides when it is imported whether its own functions are interpreted, and when ours are decorated whether these
are. So `tests/conftest.py` imports it with TRITON_INTERPRET=1, before anyone else does; here that is set while a test
of this folder runs and at no other time: tests elsewhere, in the same worker or in a process of theirs, do not see it.
A test that compiles for a GPU needs a process of its own whose environment has no TRITON_INTERPRET.

Unset memory is poisoned in the tests of this folder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from poison import poisoned

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of this test run in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


NOT_POISONED = ("recurrent_kernels", "split_recurrences", "token_by_token", "walk_recurrences", "weights", "table")
"""Files that have not been run in poisoned memory yet."""


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill unset memory with NaN."""
    with nullcontext() if request.path.stem.removeprefix("test_") in NOT_POISONED else poisoned():
        yield
