"""The table of executors: who runs a call, who plans it, and what an executor that declines costs."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, UnsupportedError, compile_attention, fallbacks, reset_fallbacks
from attnc.compiler.ir import Pattern
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.api.compiled import Backend
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.tensor_checks import TensorSizes
from attnc.runtime.executors import registry
from attnc.runtime.executors.cpu.cpu_entry import CpuExecutor
from attnc.runtime.executors.executor_protocol import CallSite, Executor, Results
from attnc.runtime.executors.registry import TABLE, Registered, choose_executor, executor_named, executor_of_plans
from attnc.runtime.fallbacks import KINDS, OTHER_EXECUTOR, OTHERS
from attnc.runtime.planning.plans import Planner

CAUSAL = compile_attention("causal").pattern
NAMES = [registered.name for registered in TABLE]


class Doubling(CpuExecutor):
    """A new executor, whose results are twice those of the cpu executor."""

    name = "doubling"

    def __init__(self, declines: str | None = None) -> None:
        self._declines = declines

    def supports(self, pattern: Pattern, call: CallSite) -> str | None:
        return self._declines or super().supports(pattern, call)

    def forward(self, planner: Planner, call: CallArguments) -> Results:
        out, lse, states = super().forward(planner, call)
        return Results(2 * out, lse, states)

    def plan(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        raise UnsupportedError("the doubling executor plans nothing")


def registered(executor: Executor, *devices: str) -> Registered:
    entry = Registered(executor.name, "unused", *devices)
    vars(entry)["executor"] = executor
    return entry


def draw(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, 2, n, 8) for _ in range(3))
    return q, k, v


def test_the_table_has_every_backend() -> None:
    assert set(NAMES) == set(get_args(Backend)) - {"auto"}
    assert [registered.executor.name for registered in TABLE] == NAMES


def test_every_kind_of_fallback_belongs_to_an_executor() -> None:
    taken = {kind for registered in TABLE for kind in registered.executor.fallbacks}
    assert taken == set(KINDS) - {OTHERS, OTHER_EXECUTOR}


def test_a_new_executor_is_one_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compile_attention("causal")(*(x := draw()))
    monkeypatch.setattr(registry, "TABLE", (registered(Doubling(), "cpu"), *TABLE))
    attend = compile_attention("causal")
    for _ in range(3):  # no later call takes a shortcut of another executor
        assert torch.equal(attend(*x), 2 * expected)
    with pytest.raises(UnsupportedError, match="plans nothing"):
        attend.plan(12)
    assert torch.equal(compile_attention("causal", backend="cpu")(*x), expected)


def test_an_executor_that_declines_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compile_attention("causal")(*(x := draw()))
    monkeypatch.setattr(registry, "TABLE", (registered(Doubling("doubling is tired"), "cpu"), *TABLE))
    reset_fallbacks()
    assert torch.equal(compile_attention("causal")(*x), expected)
    counted = [(x.pattern, x.kind, x.reason, x.count) for x in fallbacks() if x.kind == OTHER_EXECUTOR.name]
    assert counted == [("causal", OTHER_EXECUTOR.name, "doubling is tired", 1)]


def test_the_reason_of_the_first_executor_is_the_error_where_all_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TABLE", (registered(Doubling("one reason"), "cpu"),))
    with pytest.raises(UnsupportedError, match="one reason"):
        choose_executor(None, CAUSAL, CallSite(torch.device("cpu")))


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        (None, "mps", 'q is on mps, which is not supported; use backend="reference"'),
        ("cpu", "cuda", 'backend="cpu", but q is on cuda'),
        ("triton", "cpu", 'backend="triton" on cpu'),
    ],
)
def test_devices_without_an_executor(backend: str | None, device: str, message: str) -> None:
    requested = None if backend is None else executor_named(backend)
    with pytest.raises(UnsupportedError, match=message):
        choose_executor(requested, CAUSAL, CallSite(torch.device(device)))


@pytest.mark.parametrize(
    ("backend", "device", "name"),
    [
        (None, None, "cpu"),
        (None, "cuda", "triton"),
        ("triton", None, "triton"),
        ("reference", "cuda", "reference"),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_executors_of_plans(backend: str | None, device: str | None, name: str) -> None:
    requested = None if backend is None else executor_named(backend)
    assert executor_of_plans(requested, device).name == name


def test_transforms_of_patterns_with_scores_are_declined() -> None:
    alibi, site = compile_attention("alibi").pattern, CallSite(torch.device("cpu"), transformed=True)
    for name in ("cpu", "triton"):
        assert "torch.func" in str(executor_named(name).supports(alibi, site))
    assert executor_named("reference").supports(alibi, site) is None
    assert executor_named("cpu").supports(CAUSAL, site) is None


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_executors_without_texts_say_so(name: str) -> None:
    attend: Any = compile_attention("causal")
    with pytest.raises(UnsupportedError, match="operations of torch"):
        executor_named(name).source(attend._core.planner, None)  # type: ignore[arg-type]  # a request is not read


def test_memory_is_that_of_the_plan() -> None:
    attend = compile_attention("causal")
    sizes = attend._sizes(64, None, 2, 2, {})
    assert executor_named("cpu").memory(attend._core.planner, sizes, {}) == attend.plan(64, heads=2).memory
    assert executor_named("reference").memory(attend._core.planner, sizes, {}) is None


def gradients_of(executor: Executor, attend: Any, vectors: Sequence[Tensor], results: Any) -> Any:
    q, k, v = vectors
    call = CallArguments(q, k, v, {}, {}, q.shape[3] ** -0.5)
    return executor.backward(attend._core.planner, call, results, (torch.ones_like(q), None))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("saved", [True, False], ids=["from results", "by a second forward"])
def test_backward_without_autograd(name: str, saved: bool) -> None:
    attend, vectors, executor = compile_attention("sliding_window", window=5), draw(40), executor_named(name)
    results = attend(*vectors, return_lse=True) if saved else None
    leaves = [x.double().requires_grad_() for x in vectors]
    out: Any = attend.reference(*leaves)
    out.sum().backward()
    for gradient, leaf in zip(gradients_of(executor, attend, vectors, results), leaves, strict=True):
        torch.testing.assert_close(gradient.double(), leaf.grad, atol=1e-5, rtol=1e-5)


def test_unknown_backends_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match='it must be "auto", "cpu", "reference" or "triton"'):
        compile_attention("causal", backend="gpu")  # type: ignore[arg-type]  # the mistake
