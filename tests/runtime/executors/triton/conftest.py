"""Run kernels in Triton's interpreter.

Triton decides when it is imported whether its own functions are interpreted, and when a kernel is decorated whether
that kernel is. So `tests/conftest.py` imports Triton with TRITON_INTERPRET=1 before any other module does, and this
file sets the variable only while a test of this folder runs: tests elsewhere, in the same worker or in a process
that they start, do not see it. A test that compiles for a GPU needs a process whose environment has no
TRITON_INTERPRET.

Unset memory is filled with NaN in the tests of this folder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from compiled_kernels import Compiler
from poison import poisoned

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels of this test in the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


NOT_POISONED = (
    "recurrent_kernels",
    "split_recurrences",
    "token_by_token",
    "single_pass_recurrences",
    "weights",
    "kernel_tables",
)
"""Stems of test files that have not been run in poisoned memory yet, without `test_`."""


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill unset memory with NaN."""
    with nullcontext() if request.path.stem.removeprefix("test_") in NOT_POISONED else poisoned():
        yield


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    """Compile kernels for GPUs; for tests in the group `compiling`."""
    compiler = Compiler()
    yield compiler
    compiler.end()
