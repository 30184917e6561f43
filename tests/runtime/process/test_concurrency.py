"""Threads that share an `Attention`, forks at any moment, and attention in other processes."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, Dataset

from attnc import Attention, compile_attention
from attnc.compiler.ir import nodes
from attnc.runtime.executors.cpu.cpu_plans import CpuPlans
from attnc.runtime.planning import planners
from attnc.runtime.process import recent
from attnc.runtime.process.recent import Recent
from process_calls import answer, operands, results

pytestmark = [
    pytest.mark.usefixtures("one_thread"),  # torch's threads do not survive a fork
    # forks beside threads are the subject of these tests
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of (os.)?fork:DeprecationWarning"),
]

THREADS = 8
PATIENCE = 20.0
"""Timeout in seconds after which a test counts as hung."""

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")

WINDOW: dict[str, Any] = {"window": 50, "sinks": 3}
LENGTHS = (17, 120, 200, 331)


def all_equal(actual: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(actual) == len(wanted) and all(map(torch.equal, actual, wanted))


def run_in_threads(work: Callable[[int], object]) -> list[object]:
    """Return the results of `work` in threads that all start at once."""
    results: dict[int, object] = {}
    start = threading.Barrier(THREADS)

    def run(number: int) -> None:
        start.wait()
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(results) == THREADS, "a thread hangs, or has failed"
    return [results[i] for i in range(THREADS)]


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.threads
@pytest.mark.parametrize("name", ["sliding_window", "softcap"])
def test_threads_that_share_an_attention_get_equal_bits(name: str) -> None:
    params = WINDOW if name == "sliding_window" else {"cap": 2, "window": 50}
    wanted = {n: results(compile_attention(name, **params), n) for n in LENGTHS}
    attend = compile_attention(name, **params)

    def work(number: int) -> bool:
        order = LENGTHS[number % 4 :] + LENGTHS[: number % 4]
        return all(all_equal(results(attend, n), wanted[n]) for n in order * 2)

    assert all(run_in_threads(work))


def test_a_value_requested_by_several_threads_is_made_once() -> None:
    made: list[int] = []

    def make() -> object:
        made.append(threading.get_ident())
        time.sleep(0.05)
        return object()

    memory: Recent[object] = Recent(4)
    values = run_in_threads(lambda number: memory.get("key", make))
    assert len(made) == 1
    assert all(value is values[0] for value in values)
    assert not recent._MAKING


def test_plans_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = compile_attention("sliding_window", window=77)
    built: list[int] = []
    build = CpuPlans._build

    def counted(self: CpuPlans, shape: Any) -> Any:
        built.append(shape.n_q)
        time.sleep(0.05)
        return build(self, shape)

    monkeypatch.setattr(CpuPlans, "_build", counted)
    plans = run_in_threads(lambda number: attend.plan(100, heads=2))
    assert built == [100]
    assert all(plan is plans[0] for plan in plans)


def test_a_thread_retries_after_another_threads_failure() -> None:
    tried: list[int] = []

    def make() -> str:
        tried.append(1)
        time.sleep(0.01)
        if len(tried) < THREADS:
            raise ValueError("not yet")
        return "made"

    memory: Recent[str] = Recent(4)

    def work(number: int) -> str:
        try:
            return memory.get("key", make)
        except ValueError:
            return "failed"

    assert sorted(map(str, run_in_threads(work))) == ["failed"] * (THREADS - 1) + ["made"]
    assert not recent._MAKING


def test_a_value_may_be_requested_while_it_is_made() -> None:
    """A finalizer or a signal handler may request the value in the very thread that is making it."""
    memory: Recent[str] = Recent(4)
    assert memory.get("key", lambda: memory.get("key", lambda: "inner")) == "inner"
    assert memory.get("key", lambda: "new") == "inner"
    assert not recent._MAKING


def test_equal_patterns_made_by_several_threads_have_one_planner() -> None:
    attentions = run_in_threads(lambda number: compile_attention("sliding_window", window=123, sinks=2))
    shared_planners = [x._core.planner for x in attentions if isinstance(x, Attention)]
    assert len(set(map(id, shared_planners))) == 1
    assert shared_planners[0].text in planners._live_planners


# --- forks -----------------------------------------------------------------------------------------------------------


def status_of_child(work: Callable[[], bool]) -> int:
    """Run `work` in a forked child and return exit status 0 if it is true; kill a child that hangs."""
    child = os.fork()
    if not child:
        code = 3
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


@forks
@pytest.mark.parametrize("lock", [recent._LOCK, nodes._lock, planners._LOCK], ids=["values", "nodes", "planners"])
def test_a_fork_waits_for_locks_of_other_threads(lock: Any) -> None:
    locked, attend = threading.Event(), compile_attention("sliding_window", **WINDOW)

    def hold() -> None:
        with lock:
            locked.set()
            time.sleep(0.1)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    status = status_of_child(lambda: attend(*operands(64)).shape[2] == 64 and _plans_a_new_pattern())
    thread.join()
    assert status == 0


def _plans_a_new_pattern() -> bool:
    return compile_attention("sliding_window", window=91).plan(100).visible is not None


@forks
def test_a_child_makes_the_value_that_another_thread_was_making() -> None:
    memory: Recent[str] = Recent(4)
    inside, leave = threading.Event(), threading.Event()

    def slowly() -> str:
        inside.set()
        leave.wait(PATIENCE)
        return "slow"

    thread = threading.Thread(target=lambda: memory.get("key", slowly))
    thread.start()
    inside.wait()
    status = status_of_child(lambda: memory.get("key", lambda: "quick") == "quick")
    leave.set()
    thread.join()
    assert status == 0
    assert memory.get("key", lambda: "new") == "slow"


@forks
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="cached properties have no lock")
def test_a_child_computes_properties_that_another_thread_was_computing() -> None:
    lock = vars(vars(nodes.Node)["below"])["lock"]
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            inside.set()
            leave.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    status = status_of_child(_plans_a_new_pattern)
    leave.set()
    thread.join()
    assert status == 0


@forks
def test_forks_while_threads_plan() -> None:
    attend = compile_attention("sliding_window", window=31)
    wanted, stop = results(attend, 40), threading.Event()

    def plan(first: int) -> None:
        n = first
        while not stop.is_set():
            attend.plan(n)
            n += 3

    threads = [threading.Thread(target=plan, args=(1000 + i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    statuses = [
        status_of_child(lambda: all_equal(results(attend, 40), wanted) and _plans_a_new_pattern()) for _ in range(12)
    ]
    stop.set()
    for thread in threads:
        thread.join()
    assert statuses == [0] * 12


# --- other processes -------------------------------------------------------------------------------------------------


def test_pickling_round_trip() -> None:
    attend = compile_attention("sliding_window", **WINDOW)
    unpickled = pickle.loads(pickle.dumps(attend))
    assert all_equal(results(unpickled, 130), results(attend, 130))
    module: Any = compile_attention("music_relative").module(heads=4, dk=8, dv=8, length=40)
    with torch.no_grad():
        module.E.normal_()
    other = pickle.loads(pickle.dumps(module))
    assert torch.equal(other.E, module.E)
    q, k, v = (x.repeat_interleave(4 // x.shape[1], 1) for x in operands(40))
    assert torch.equal(other(q, k, v), module(q, k, v))


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=forks)])
def test_other_processes_give_the_same_bits(method: str) -> None:
    attend = compile_attention("sliding_window", **WINDOW)
    module: Any = compile_attention("gpt_oss", window=20).module(heads=4, dk=8, dv=8, sink=torch.randn(4))
    context: Any = multiprocessing.get_context(method)
    queue, lengths = context.Queue(), list(LENGTHS)
    process = context.Process(target=answer, args=(attend, module, lengths, queue))
    process.start()
    try:
        results_in_child, of_module = queue.get(timeout=PATIENCE)
        process.join(PATIENCE)
        assert process.exitcode == 0
    finally:
        process.kill()
    for n, tensors in zip(lengths, results_in_child, strict=True):
        assert all_equal([torch.from_numpy(x) for x in tensors], results(attend, n))
    assert torch.equal(torch.from_numpy(of_module), module(*operands(64)))


class _Rows(Dataset[Tensor]):
    """A dataset whose items have passed through an attention."""

    def __init__(self, attend: Attention) -> None:
        self._attend = attend

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self._attend(*operands(LENGTHS[index])).sum(2)


@forks
def test_workers_of_a_data_loader() -> None:
    attend = compile_attention("sliding_window", **WINDOW)
    rows = _Rows(attend)
    loader = DataLoader(rows, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE)
    assert torch.equal(torch.cat(list(loader)), torch.stack([rows[i] for i in range(len(rows))]))
