"""Settings of every test: tiers, hypothesis profiles, threads and fixed seeds.

Nothing here imports torch, so that the tests of `spec` and `compiler` start in milliseconds. `make test` and `make
test-all` give every worker one thread, as several processes whose threads wait for each other on few cores take many
times as long. Thread counts change the order of summation and users run with the default, so tests marked `threads` set
as many threads as there are cores. Files of thousands of small products ask for `one_thread`, for a plain call of
pytest. Tests drawn by hypothesis take their tensors from a drawn seed.
"""

import gc
import importlib.util
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import quick_interpreter
import tiers
from attnc.compiler.ir.verify_ir import verify_passes

# `ci`, the default, draws the same examples every time; `explore` draws new and many:
#   HYPOTHESIS_PROFILE=explore pytest tests/compiler
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=tiers.ALL_EXAMPLES,
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
settings.register_profile("short", settings.get_profile("ci"), max_examples=tiers.SHORT_EXAMPLES)

SEED = 20250


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options `--tier` and `--write-durations`."""
    group = parser.getgroup("attnc")
    group.addoption("--tier", choices=("short", "all"), default="all", help="which tests to run (default: all)")
    group.addoption("--write-durations", action="store_true", help="write the tier's times to tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the profile of hypothesis, and record durations if requested."""
    tier = config.getoption("--tier")
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or {"short": "short", "all": "ci"}[tier])
    if config.getoption("--write-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(tiers.Durations(tier, time.monotonic()))


def pytest_report_header(config: pytest.Config) -> str:
    """Return a line about the tests that will run and their approximate time."""
    return tiers.announcement(config.getoption("--tier"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests outside the tier."""
    if config.getoption("--tier") == "short":
        items[:], others = tiers.split(items)
        config.hook.pytest_deselected(items=others)


def pytest_collection_finish() -> None:
    """Leave modules and collected tests out of garbage collections, which take 4 % of the time of a run otherwise."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share tests between workers by file and function if xdist shares them by groups."""
    if config.getoption("dist") != "loadgroup":
        return None
    from scopes import scheduler  # xdist is optional

    return scheduler(config, log)


@pytest.fixture(autouse=True)
def _all_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give torch as many threads as there are cores in tests marked `threads`."""
    if request.node.get_closest_marker("threads") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run small calls as large ones: selected blocks are gathered instead of masked."""
    from attnc.runtime.executors.cpu import masked

    monkeypatch.setattr(masked, "WORK", 0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Set one thread of torch for the tests of a file."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def import_interpreted() -> None:
    """Import Triton in interpreter mode, its own functions included, as `tests/runtime/executors/triton` requires."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language as tl

        if type(tl.sum).__name__ != "InterpretedFunction":
            raise pytest.UsageError("triton was imported before tests/conftest.py: its functions are not interpreted")
        quick_interpreter.speed_up()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if importlib.util.find_spec("triton"):
    import_interpreted()

# Every pattern that a compiler pass returns is verified, in child processes too.
os.environ["ATTNC_VERIFY_IR"] = "1"
verify_passes()

# Plans depend on the machine's measured rates; tests do not, whatever the user has measured.
os.environ["ATTNC_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "attnc-tests-have-no-cache")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start each test from the same random state in the libraries that are loaded."""
    random.seed(SEED)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)
