"""Fallbacks are named, counted and logged; backends and devices are used as requested, or refused with a reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import attnc
from asking_patterns import NOT_IN_KERNELS
from attnc import ArgumentError, ArgumentTypeError, Fallback, UnsupportedError, compile_attention
from attnc.runtime import fallbacks as module

EQUAL = "pattern equal\n    input x: int[token]\n    visible x[q] == x[k]\n"
"""A pattern that has no tile plan for random numbers."""


@pytest.fixture(autouse=True)
def reset_counts() -> Iterator[None]:
    attnc.reset_fallbacks()
    yield
    attnc.reset_fallbacks()


def vectors(n: int = 32, width: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 2, n, width, generator=torch.Generator().manual_seed(n)).to(dtype)


def backward(total: Tensor) -> None:
    torch.autograd.backward(total)


def counts_by_reason() -> dict[tuple[str, str], int]:
    """Return the counts by kind and first word of the reason."""
    return {(record.kind, record.reason.partition(":")[0]): record.count for record in attnc.fallbacks()}


# --- the record ------------------------------------------------------------------------------------------------------


def test_normal_calls_count_nothing() -> None:
    x = vectors().requires_grad_()
    for name in ("causal", "sliding_window", "alibi"):
        attend = compile_attention(name)
        backward(attend(x, x, x).square().sum())
        with torch.no_grad():
            for _ in range(3):
                attend(x, x, x)
    assert attnc.fallbacks() == ()


def test_records_are_immutable_printed_and_in_order() -> None:
    module.note("b", module.COPY, "q")
    module.note("a", module.DENSE, "why")
    module.note("b", module.COPY, "q")
    assert [str(record) for record in attnc.fallbacks()] == [
        "`a`: dense by row blocks, once: why",
        "`b`: copy, 2 times: q",
    ]
    with pytest.raises(FrozenInstanceError):
        attnc.fallbacks()[0].count = 3  # type: ignore[misc]
    attnc.reset_fallbacks()
    assert attnc.fallbacks() == ()


def test_records_are_bounded_without_losing_counts() -> None:
    for i in range(module.MOST + 10):
        module.note("p", module.COPY, f"{i:04}")
    records = attnc.fallbacks()
    assert len(records) == module.MOST + 1
    assert sum(record.count for record in records) == module.MOST + 10
    assert [record.count for record in records if record.kind == "others"] == [10]


def test_threads_count_together() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: module.note("p", module.COPY, "q"), range(2000)))
    assert attnc.fallbacks() == (Fallback("p", "copy", "q", 2000),)


def test_slow_paths_warn_once_and_copies_inform(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "attnc"):
        for _ in range(3):
            module.note("p", module.DENSE, "%s is no format")
            module.note("p", module.COPY, "q")
    records = [record for record in caplog.records if record.name == "attnc.runtime.fallbacks"]
    levels = [(record.levelname, record.getMessage()) for record in records]
    slow, copied = "`p`: dense by row blocks: %s is no format", "`p`: copy: q"
    assert levels == [("WARNING", slow), ("INFO", copied), *[("DEBUG", slow), ("DEBUG", copied)] * 2]


# --- on the CPU ------------------------------------------------------------------------------------------------------


def test_dense_by_row_blocks_is_counted_in_every_call() -> None:
    x = torch.randint(0, 1000, (8192,), generator=torch.Generator().manual_seed(0))
    q = torch.randn(1, 1, 8192, 8)
    attend = compile_attention(EQUAL)
    plan = attend.plan(8192, x=x, head_dim=8)
    assert plan.fallback is not None
    assert f"fallback: {plan.fallback}" in str(plan)
    for _ in range(2):
        attend(q, q, q, x=x)
    assert attnc.fallbacks() == (Fallback("equal", "dense by row blocks", plan.fallback, 2),)
    with pytest.raises(UnsupportedError, match="strict: "):
        compile_attention(EQUAL, strict=True)(q, q, q, x=x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q, k, v[..., :8]), "v"),
        (lambda q, k, v: (q.mT.contiguous().mT, k, v), "q"),
        (lambda q, k, v: (q, k[..., :1].expand_as(k), v), "k"),
    ],
)
def test_operands_that_are_copied_are_counted(change: Callable[..., tuple[Tensor, ...]], reason: str) -> None:
    q, k, v = change(vectors(), vectors(), vectors())
    attend = compile_attention("causal")
    torch.testing.assert_close(attend(q, k, v), attend.reference(q, k, v))
    assert counts_by_reason() == {("copy", reason): 1}
    attend(q, k, v)
    assert counts_by_reason() == {("copy", reason): 2}


def test_strides_that_the_kernel_accepts_are_not_counted() -> None:
    q = vectors().transpose(1, 2).contiguous().transpose(1, 2)
    compile_attention("causal")(q, q[:, :1], q[:, :1])
    assert counts_by_reason() == {}


def test_gradients_that_are_copied_are_counted() -> None:
    q, k, v = (vectors().requires_grad_() for _ in range(3))
    out, lse = compile_attention("causal")(q, k, v, return_lse=True)
    backward(out.sum() + lse.sum())
    assert counts_by_reason() == {("copy", "the gradient of the LSE widens q, k, v, out and its gradient"): 1}
    attnc.reset_fallbacks()
    backward(compile_attention("causal")(q, k, v).sum())
    assert counts_by_reason() == {("copy", "the gradient of out"): 1}  # the gradient of a sum is one number, expanded


def test_autocast_is_counted_and_fp64_left_alone() -> None:
    for name in ("causal", "softcap", "retention"):
        attend = compile_attention(name)
        with torch.autocast("cpu", torch.bfloat16):
            assert attend(vectors(), vectors(), vectors()).dtype == torch.bfloat16
            assert attend(*(vectors(dtype=torch.float64),) * 3).dtype == torch.float64
    reason = "autocast: q, k and v from float32 to bfloat16"
    assert attnc.fallbacks() == tuple(Fallback(name, "cast", reason, 1) for name in ("causal", "retention", "softcap"))


@pytest.mark.parametrize("name", ["causal", "softcap", "softplus_lssa", "retention", "gated_delta_net"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_changes_the_dtype_of_operands_only(name: str, backend: Any) -> None:
    """Sums stay in fp32, as for operands that the caller has cast."""
    attend = compile_attention(name, backend=backend)
    inputs: dict[str, Any] = (
        {"g": -torch.rand(1, 32, 2), "beta": torch.rand(1, 32, 2)} if name == "gated_delta_net" else {}
    )
    wide, narrow = (
        [vectors(dtype=dtype).requires_grad_() for _ in range(3)] for dtype in (torch.float32, torch.bfloat16)
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*wide, **inputs)
    # the reference's backward is torch's own, which autocast must not change
    with torch.autocast("cpu", torch.bfloat16, enabled=backend == "auto"):
        out.float().square().sum().backward()
    wanted = attend(*narrow, **inputs)
    wanted.float().square().sum().backward()
    assert torch.equal(out, wanted)
    for a, b in zip(wide, narrow, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad.bfloat16(), b.grad)


def test_a_wide_input_is_counted() -> None:
    text = "pattern biased\n    learned bias: real[key]\n    score dot(q, k) + bias[k]\n"
    bias = torch.randn(32, dtype=torch.float64)
    compile_attention(text)(vectors(), vectors(), vectors(), bias=bias.float())
    compile_attention(text)(*(vectors(dtype=torch.float64),) * 3, bias=bias)
    compile_attention(text)(vectors(), vectors(), vectors(), bias=bias.tolist())
    assert counts_by_reason() == {}
    compile_attention(text)(vectors(), vectors(), vectors(), bias=bias)
    assert counts_by_reason() == {("cast", "the input `bias`"): 1}


def test_weights_of_several_passes_are_counted() -> None:
    compile_attention("softplus_lssar")(vectors(), vectors(), vectors())
    ((kind, _),) = counts_by_reason()
    assert kind == "several passes"
    with pytest.raises(UnsupportedError, match="passes"):
        compile_attention("softplus_lssar", strict=True)


def test_selections_of_each_sequence_are_counted() -> None:
    attend = compile_attention("moba", block=8, topk=2)
    attend(vectors(), vectors(), vectors())
    assert counts_by_reason() == {}
    attend(vectors(), vectors(), vectors(), cu_seqlens=torch.tensor([0, 16, 32]))
    assert counts_by_reason() == {("one sequence after another", "each sequence selects separately"): 1}


def test_recurrences_that_run_token_by_token_are_counted() -> None:
    x = vectors(8, 4)
    compile_attention("retention")(x, x, x)
    assert counts_by_reason() == {}
    text = "recurrence squared\n    state S: [dk, dv]\n    step S = tanh(S) + outer(k, v)\n    read q @ S\n"
    compile_attention(text)(x, x, x)
    ((kind, _),) = counts_by_reason()
    assert kind == "token by token"
    attnc.reset_fallbacks()
    compile_attention(text, backend="reference")(x, x, x)  # the user requested the slow path
    assert counts_by_reason() == {}


# --- in torch.compile ------------------------------------------------------------------------------------------------


def traced(run: Callable[..., Tensor]) -> Any:
    return torch.compile(run, fullgraph=True, backend="aot_eager")


def test_a_graph_is_not_split_and_counts_when_it_runs() -> None:
    attend = compile_attention("causal")

    def attend_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v) * 2

    q, v = vectors(), vectors()[..., :8]
    compiled = traced(attend_twice)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(q, q, v), attend.reference(q, q, v) * 2)
    assert counts_by_reason() == {("copy", "v"): 2}


def test_a_graph_under_autocast_is_not_split() -> None:
    for name in ("causal", "softcap"):
        attend = compile_attention(name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert traced(attend)(vectors(), vectors(), vectors()).dtype == torch.bfloat16
    assert ("cast", "autocast") not in counts_by_reason()  # the graph contains the casts


def test_a_node_of_a_graph_counts_its_copies() -> None:
    attend = compile_attention("davit_window", height=4, width=8, window=4)
    compiled = traced(attend)
    apart = vectors().transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        for q, count in ((vectors(), None), (apart, 1)):
            torch.testing.assert_close(compiled(q, q, q), attend.reference(q, q, q))
            assert counts_by_reason().get(("copy", "out")) == count


# --- requested backends and devices ----------------------------------------------------------------------------------


def test_the_cpu_backend_refuses_other_devices() -> None:
    attend = compile_attention("causal", backend="cpu")
    hierarchical = compile_attention("hierarchical", group=8, backend="cpu")
    with FakeTensorMode():
        q, few, single = (torch.randn(1, 2, count, 16, device="cuda") for count in (32, 4, 1))
        for call in (
            lambda: attend(q, q, q),
            lambda: hierarchical(q, q, q),
            lambda: compile_attention("retention", backend="cpu")(q, q, q),
            lambda: compile_attention("retention", backend="cpu")(q, q, q, return_state=True),
            lambda: attend.decode(single, q, q, kv_len=32),
            lambda: attend.prefill(few, q, q, kv_len=32),
        ):
            with pytest.raises(UnsupportedError, match=r'backend="cpu", but q is on cuda:0: .*; move them, or leave'):
                call()
        assert compile_attention("causal")(q, q, q).device.type == "cuda"
    with pytest.raises(UnsupportedError, match='device=cuda and backend="cpu"'):
        attend.plan(32, device="cuda")


@pytest.mark.parametrize("name", ["causal", "softcap", "retention", "hierarchical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_triton_backend_on_a_cpu_needs_its_interpreter(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs: dict[str, Any] = {"group": 8} if name == "hierarchical" else {}
    attend = compile_attention(name, backend="triton", **inputs)
    x = vectors(dtype=dtype)
    with pytest.raises(UnsupportedError, match=r'backend="triton" on cpu: .*TRITON_INTERPRET=1'):
        attend(x, x, x)


@pytest.mark.parametrize("name", ["causal", "softcap"])
def test_float64_has_no_kernels_and_is_tiles_in_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    attend = compile_attention(name, backend="triton")
    x = vectors(dtype=torch.float64)
    plan = attend.plan(32, heads=2, head_dim=16, dtype=torch.float64)
    assert (plan.executor, plan.fallback) == ("torch", "there are no kernels for numbers of float64")
    assert "executor torch: " in str(plan)
    torch.testing.assert_close(attend(x, x, x), attend.reference(x, x, x))
    assert attnc.fallbacks() == (Fallback(name, "tiles in torch", "there are no kernels for numbers of float64", 1),)
    with pytest.raises(UnsupportedError, match=r"strict: .* no kernels for numbers of float64"):
        compile_attention(name, backend="triton", strict=True)(x, x, x)


def test_other_dtypes_and_devices_than_q_are_refused() -> None:
    x = vectors()
    elsewhere = torch.empty(1, 2, 32, 16, device="meta")
    for name in ("causal", "softcap", "retention"):
        attend = compile_attention(name)
        with pytest.raises(ArgumentTypeError, match="q, k and v differ in dtype"):
            attend(x, x.double(), x)
        with pytest.raises(ArgumentError, match="q, k and v differ in device"):
            attend(x, elsewhere, x)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_real_input_on_another_device_is_refused(backend: Any) -> None:
    x = vectors()
    gate = torch.zeros(1, 32, 2, device="meta")
    with pytest.raises(ArgumentError, match=r"the input `f` is on meta and q on cpu: move it, f.to\('cpu'\)"):
        compile_attention("fox", backend=backend)(x, x, x, f=gate)


def test_blocks_without_kernels_and_strides_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = vectors(16)
    attend = compile_attention("causal", backend="triton")
    attend(x, x, x)
    assert counts_by_reason() == {}
    strided = torch.randn(1, 2, 16, 17)[..., :16]
    torch.testing.assert_close(attend(strided, x, x), attend.reference(strided, x, x), rtol=1e-5, atol=1e-5)
    assert counts_by_reason() == {("copy", "q"): 1}


def test_paths_without_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, wide = vectors(), vectors(dtype=torch.float64)
    compile_attention(NOT_IN_KERNELS, backend="triton")(x, x, x, seen=torch.zeros(1, 5, dtype=torch.int64))
    counts = [(record.kind, record.count) for record in attnc.fallbacks() if record.kind != "cast"]
    assert counts == [("tiles listed by the host", 1)]
    attnc.reset_fallbacks()
    compile_attention("retention", backend="triton")(wide, wide, wide)
    assert counts_by_reason() == {("recurrence in torch", "float64 has no kernels"): 1}
    attnc.reset_fallbacks()
    compile_attention("moba", block=8, topk=2, backend="triton")(wide, wide, wide)
    assert ("no gathered queries", "there are no kernels for selected blocks with float64") in counts_by_reason()


def test_inputs_that_kernels_read_are_moved_and_narrowed() -> None:
    from attnc.runtime.executors.triton.planner import as_read

    x = torch.zeros(4, dtype=torch.int32)
    as_read("p", "x", x, x.device)
    assert counts_by_reason() == {}
    as_read("p", "x", x.long(), torch.device("meta"))
    assert attnc.fallbacks() == (
        Fallback("p", "cast", "the input `x`: int64 to int32", 1),
        Fallback("p", "moved", "the input `x` is on cpu", 1),
    )


def test_host_reads_of_device_tensors_are_counted() -> None:
    from attnc.runtime.call.tensor_checks import call_shape, check_promises, check_tensors

    attend, document = compile_attention("fox"), compile_attention("document")
    with FakeTensorMode():
        q = torch.randn(1, 2, 32, 16, device="cuda")
        with pytest.raises(DataDependentOutputException):
            check_promises(attend.pattern, [torch.zeros(1, 32, 2, device="cuda")])
        with pytest.raises(ArgumentTypeError, match="cannot be read"):
            inputs = {"doc": torch.zeros(1, 32, dtype=torch.int64, device="cuda")}
            call_shape(document.pattern, check_tensors(q, q, q), inputs)
        with pytest.raises(DataDependentOutputException):
            compile_attention("causal").prefill(q, q, q, kv_len=torch.full((1,), 32, device="cuda"))
    assert attnc.fallbacks() == (
        Fallback("causal", "host wait", "`kv_len` is on the device, but the host needs it to plan", 1),
        Fallback("document", "host wait", "the input `doc` is read by the host", 1),
        Fallback("fox", "host wait", "the input `f` is checked to be log_decay", 1),
    )


def test_factors_that_are_no_decays_are_counted() -> None:
    x = vectors(8, 4)
    text = "recurrence grows\n    state S: [dk, dv]\n    step S = 2 * S + outer(k, v)\n    read q @ S\n"
    compile_attention(text)(x, x, x)
    assert counts_by_reason() == {("factors of any size", "a factor of its state is above 1, or below 0"): 1}


def test_selections_that_are_no_tensors_are_counted() -> None:
    attend = compile_attention("sparse_d", block=8)
    selected = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    x = vectors()
    out = attend(x, x, x, map=selected)
    assert counts_by_reason() == {}
    torch.testing.assert_close(attend(x, x, x, map=selected.numpy()), out)
    assert [record.kind for record in attnc.fallbacks()] == ["no gathered queries"]


# --- plans -----------------------------------------------------------------------------------------------------------


def test_plans_say_that_the_reference_runs() -> None:
    one = compile_attention("sliding_window", window=4, backend="reference", strict=True).plan(64, heads=2)
    assert (one.executor, one.schedule, one.fallback, one.groups) == ("reference", "dense", None, ())
    assert one.tiles.live == one.tiles.total
    assert one.visible == 2 * (64 * 4 - 6)
    assert 'why: backend="reference": every score' in str(one)
    branches = compile_attention("hierarchical", group=8, backend="reference").plan(64)
    assert {plan.executor for _, plan in branches.branches} == {"reference"}
    chosen = compile_attention("moba", block=8, topk=2, backend="reference").plan(64)
    assert chosen.executor == "reference"
    hybrid = compile_attention("hybrid_window_linear", backend="reference").plan(64)
    assert "why: before them the state of `far`, token by token" in str(hybrid)


def test_plans_of_branches_and_selections_name_their_executor() -> None:
    cases: dict[str, dict[str, Any]] = {
        "hierarchical": {"group": 8},
        "moba": {"block": 8, "topk": 2},
        "landmark": {"block": 7},
    }
    for name, inputs in cases.items():
        for device, executors in (("cpu", {"cpu"}), ("cuda", {"triton", "torch"})):
            plan = compile_attention(name, **inputs).plan(64, device=device)
            for branch_plan in [plan for _, plan in plan.branches] or [plan]:
                assert branch_plan.executor in executors
                assert branch_plan.reasons
                assert (branch_plan.executor == "torch") == (branch_plan.fallback is not None)
