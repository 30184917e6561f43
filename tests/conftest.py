"""Settings of every test: hypothesis profiles and fixed seeds.

Nothing here imports torch, so that the tests of `spec` and `compiler` start in milliseconds. The number of torch's
threads is left alone. `make test` says one, as several processes whose threads wait for each other on few cores take
many times as long; as thread counts change the order of summation and users run with the default, the executors' tests
run a second time with it (THREADED in the Makefile). Files of thousands of small products ask for `one_thread`, for who
calls pytest without it. Tests drawn by hypothesis take their tensors from a drawn seed.
"""

import importlib.util
import os
import random
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from attnc.compiler.verify_ir import verify_passes

# `ci`, the default, draws the same examples every time; `explore` draws new and many:
#   HYPOTHESIS_PROFILE=explore pytest tests/compiler
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore",
    deadline=None,
    max_examples=2000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

SEED = 20250


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run few tokens as many are run: what is chosen is gathered, and no masked call replaces it."""
    from attnc.runtime.cpu import masked

    monkeypatch.setattr(masked, "WORK", 0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch's for the tests of a file."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def import_interpreted() -> None:
    """Import Triton so that its own functions are interpreted where ours are, which `tests/runtime/gpu` asks for."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language as tl

        if type(tl.sum).__name__ != "InterpretedFunction":
            raise pytest.UsageError("triton was imported before tests/conftest.py: its functions are not interpreted")
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if importlib.util.find_spec("triton"):
    import_interpreted()

# Every pattern that a pass of the compiler returns is verified, in the processes that tests start as well.
os.environ["ATTNC_VERIFY_IR"] = "1"
verify_passes()

# Plans depend on the machine's measured rates: tests do not, whatever the user has measured.
os.environ["ATTNC_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "attnc-tests-have-no-cache")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start each test from the same random state, in those libraries that are loaded."""
    random.seed(SEED)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)
