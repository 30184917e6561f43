"""A call that equals the previous one in shape goes straight to the kernel; calls that must not do so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from attnc import ArgumentError, ArgumentTypeError, Attention, UnsupportedError, compile_attention
from attnc.runtime.executors.cpu import bound_plan, cpu_executor, flash_kernel
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.settings import Settings
from operator_calls import ATTEND

BLIND = "pattern blind\n    visible k < q\n"
FORWARD = cpu_executor.forward


def draw(
    n: int = 24,
    *,
    batch: int = 1,
    kv_heads: int = 4,
    dv: int = 8,
    order: tuple[int, ...] = (0, 1, 2, 3),
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Draw q, k and v of 4 query heads whose dimensions lie in memory in `order`."""
    back = [order.index(i) for i in range(4)]
    shapes = [(batch, 4, n, 8), (batch, kv_heads, n, 8), (batch, kv_heads, n, dv)]
    return [torch.randn([shape[i] for i in order], dtype=dtype).permute(back) for shape in shapes]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Record every run of the executor, which a direct call skips."""
    executed: list[None] = []

    def counted(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        executed.append(None)
        return FORWARD(*arguments, **options)

    monkeypatch.setattr(cpu_executor, "forward", counted)
    return executed


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def attention_after_call(spec: str = "causal", *tensors: Tensor, **params: Any) -> Attention:
    """Return an Attention whose last call was on these tensors, or on `draw()` if none are given."""
    attend = compile_attention(spec, **params)
    cpu_plans(attend._core.planner).direct = None
    attend(*(tensors or draw()))
    return attend


def indirect_result(attend: Attention, *tensors: Tensor, **options: Any) -> Tensor:
    """Return the output of a call that is not direct: calls with an LSE never are."""
    out, _ = attend(*tensors, return_lse=True, **options)
    assert isinstance(out, Tensor)
    return out


def assert_equal_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


# --- direct calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "params", "shape"),
    [
        ("full", {}, {}),
        ("causal", {}, {"dtype": torch.bfloat16}),
        ("causal", {}, {"order": (0, 2, 1, 3)}),
        ("causal", {}, {"dtype": torch.float64, "kv_heads": 2}),
        ("sliding_window", {"window": 5, "sinks": 1}, {}),
        ("sliding_window", {"window": 5, "sinks": 1}, {"kv_heads": 1, "order": (0, 2, 1, 3), "dtype": torch.float16}),
    ],
)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_second_call_is_direct_and_gives_the_same(
    spec: str, params: dict[str, Any], shape: dict[str, Any], scale: float | None, runs: list[None]
) -> None:
    attend = compile_attention(spec, **params)
    first, second = draw(**shape), draw(**shape)
    attend(*first, scale=scale)
    expected = indirect_result(attend, *second, scale=scale)
    count = len(runs)
    assert_equal_bits(attend(*second, scale=scale), expected)
    assert len(runs) == count


def test_calls_without_gradients_are_direct(runs: list[None]) -> None:
    attend, tensors = attention_after_call(), draw()
    with torch.enable_grad():
        assert not attend(*tensors).requires_grad
    attend(*(t.requires_grad_() for t in tensors))
    with torch.inference_mode():
        attend(*draw())
    assert len(runs) == 1


# --- calls that differ from the remembered one ------------------------------------------------------------------------


def packed() -> list[Tensor]:
    """Slices of one tensor: the shapes of `draw()` with other strides."""
    return list(torch.chunk(torch.randn(1, 12, 24, 8), 3, dim=1))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: draw(25), {}),
        (lambda: draw(batch=2), {}),
        (lambda: draw(kv_heads=2), {}),
        (lambda: draw(dv=12), {}),
        (lambda: draw(dtype=torch.bfloat16), {}),
        (lambda: draw(order=(0, 2, 1, 3)), {}),
        (lambda: draw(order=(3, 0, 1, 2)), {}),
        (packed, {}),
        (lambda: [draw()[0], *draw(order=(0, 2, 1, 3))[1:]], {}),
        (lambda: [draw()[0], *draw(order=(3, 0, 1, 2))[1:]], {}),
        (draw, {"scale": 0.7}),
        (draw, {"scale": 8**-0.5}),
        (draw, {"scale": 1}),
        (lambda: [nn.Parameter(t) for t in draw()], {}),
    ],
)
def test_other_calls_are_not_direct(
    make: Callable[[], list[Tensor]], options: dict[str, Any], runs: list[None]
) -> None:
    attend, tensors = attention_after_call(), make()
    got = attend(*tensors, **options)
    assert len(runs) == 2
    assert_equal_bits(got, indirect_result(attend, *tensors, **options))
    attend(*tensors, **options)
    assert_equal_bits(attend(*tensors, **options), got)


def test_a_scale_is_remembered_with_its_call(runs: list[None]) -> None:
    attend, tensors = attention_after_call(), draw()
    for scale in (0.5, 1.0, None):
        got = attend(*tensors, scale=scale)
        assert_equal_bits(got, indirect_result(attend, *tensors, scale=scale))
        assert_equal_bits(attend(*tensors, scale=scale), got)
    assert len(runs) == 1 + 3 * 2
    wrong: list[tuple[Any, type[Exception]]] = [
        (True, ArgumentTypeError),
        (torch.tensor(1.0), ArgumentTypeError),
        (torch.inf, ArgumentError),
    ]
    for scale, error in wrong:
        attend(*tensors, scale=1.0)
        with pytest.raises(error, match="scale is"):
            attend(*tensors, scale=scale)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.numpy(), k, v),
        lambda q, k, v: (q.to_sparse(), k, v),
        lambda q, k, v: (q, k, v.to_sparse()),
        lambda q, k, v: (q, k.double(), v),
        lambda q, k, v: (q, k, v[:, :, :9]),
        lambda q, k, v: (q, k, None),
    ],
)
def test_tensors_are_checked_also_after_a_direct_call(change: Callable[..., Any]) -> None:
    attend = attention_after_call()
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        attend(*change(*draw()))
    with pytest.raises(ArgumentTypeError, match="no input `doc`"):
        attend(*draw(), doc=None)


@torch.enable_grad()
def test_gradients_are_recorded() -> None:
    attend = attention_after_call()
    for i in range(3):
        tensors = draw()
        tensors[i].requires_grad_()
        out = attend(*tensors)
        torch.autograd.grad(out.sum(), tensors[i])


# --- autograd, autocast, transforms and modes -------------------------------------------------------------------------


def test_autocast() -> None:
    attend, (q, k, v) = attention_after_call(), draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal_bits(attend(q, k, v), attend(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_transforms() -> None:
    attend, (q, k, v) = attention_after_call(), draw()
    with pytest.raises(UnsupportedError, match="vmap"):
        vmap(lambda x: attend(x, k, v))(q[None])
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        attend(forward_ad.make_dual(q, q), k, v)  # type: ignore[no-untyped-call]


def test_dispatch_modes_see_the_operator() -> None:
    operators: list[Any] = []

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.append(func)
            return func(*args, **(kwargs or {}))

    attend = attention_after_call()
    tensors = draw()
    with Mode():  # type: ignore[no-untyped-call]
        attend(*tensors)
    assert operators == [ATTEND]


def test_subclasses_and_fake_tensors() -> None:
    class Own(Tensor):
        pass

    attend, (q, k, v) = attention_after_call(), draw()
    assert type(attend(q.as_subclass(Own), k, v)) is Own
    with FakeTensorMode() as mode:
        assert attend(*map(mode.from_tensor, (q, k, v))).shape == q.shape
    assert attend(*(t.to("meta") for t in (q, k, v))).device.type == "meta"


def test_compiled_code_calls_the_operator() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        forward: Callable[..., Any] = graph.forward
        return forward

    attend, tensors = attention_after_call(), draw()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    assert_equal_bits(compiled(*tensors), attend(*tensors))
    attend(*draw(8))
    attend(*draw(8))
    compiled(*tensors)
    assert len(graphs) == 1 and "attnc.attend" in graphs[0]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # sizes are tensors in a trace
def test_traces_agree() -> None:
    attend = compile_attention("pattern traced\n    align end\n    visible k <= q\n")
    tensors, other_tensors = draw(), draw()
    for _ in range(2):
        traced = torch.jit.trace(attend.__call__, tuple(tensors))  # type: ignore[no-untyped-call]
        assert_equal_bits(traced(*other_tensors), indirect_result(attend, *other_tensors))


def test_the_reference_shares_the_planner_and_is_never_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, dense = attention_after_call(), compile_attention("causal", backend="reference")
    assert dense._core.planner is attend._core.planner
    tensors = draw()
    expected = dense.reference(*tensors)
    monkeypatch.setattr(flash_kernel, "attend", None)
    assert_equal_bits(dense(*tensors), expected)


def test_threads() -> None:
    attend = attention_after_call()
    calls = [(draw(n), scale) for n, scale in ((8, None), (8, 0.5), (16, None), (24, 1.0))]
    expected = [indirect_result(attend, *tensors, scale=scale) for tensors, scale in calls]
    wrong: list[int] = []

    def run(first: int) -> None:
        with torch.no_grad():
            for i in range(first, first + 200):
                tensors, scale = calls[i % 4]
                if not torch.equal(attend(*tensors, scale=scale), expected[i % 4]):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- calls that are never remembered ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "tensors", "inputs"),
    [
        ("causal", draw(batch=2), {}),
        ("causal", draw(dv=5), {}),
        ("causal", draw(dv=12), {}),
        ("causal", draw(order=(3, 0, 1, 2)), {}),
        ("causal", packed(), {}),
        ("causal", draw(order=(0, 1, 3, 2)), {}),
        (BLIND, draw(), {}),
        ("document", draw(), {"doc": torch.zeros(1, 24, dtype=torch.int64)}),
    ],
)
def test_calls_that_do_more_than_run_the_kernel_are_not_remembered(
    spec: str, tensors: list[Tensor], inputs: dict[str, Any], runs: list[None]
) -> None:
    attend = compile_attention(spec)
    cpu_plans(attend._core.planner).direct = None
    assert_equal_bits(attend(*tensors, **inputs), attend(*tensors, **inputs))
    assert len(runs) == 2 and cpu_plans(attend._core.planner).direct is None


def test_a_call_whose_mask_is_not_stored_is_not_remembered(monkeypatch: pytest.MonkeyPatch, runs: list[None]) -> None:
    monkeypatch.setattr(bound_plan, "SETTINGS", Settings(mask_elements=24 * 24 - 1))
    attend = attention_after_call("sliding_window", window=6, sinks=1)
    assert cpu_plans(attend._core.planner).direct is None
