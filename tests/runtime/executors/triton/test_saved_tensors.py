"""Tensors that calls of the triton executor keep for the backward, and the memory of these calls."""

from __future__ import annotations

import gc
import linecache
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.compiler.kernels.attention_kernels import HeadShape
from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.targets import TARGETS
from attnc.runtime.call.device_targets import pretending
from attnc.runtime.executors.triton import launch
from attnc.runtime.executors.triton.launch import started_by
from attnc.runtime.executors.triton.planner import gpu_planner
from attnc.runtime.process.recent import Recent
from tensor_memory import bytes_of, measured

N = 64
CASES: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "plain": ("causal", {}, {}),
    "ranges": ("sliding_window", {"window": 20, "sinks": 2}, {}),
    "documents": ("document", {}, {"doc": torch.arange(N)[None] // 20}),
    "packed": ("causal", {}, {"cu_seqlens": torch.tensor([0, 30, N])}),
    "score": ("softcap", {"cap": 2, "window": 20}, {}),
}


def draw_qkv(n: int, dk: int, dv: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(1, heads, n, d).to(dtype).requires_grad_() for heads, d in ((4, dk), (2, dk), (2, dv)))
    return q, k, v


@pytest.mark.parametrize("kind", CASES)
def test_saved_are_q_k_v_out_and_lse(kind: str) -> None:
    name, params, inputs = CASES[kind]
    attend, (q, k, v) = compile_attention(name, backend="triton", **params), draw_qkv(N, 16, 16, torch.float32)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    def call() -> Any:
        result = attend(q, k, v, return_lse=True, **inputs)
        gc.collect()  # Triton's interpreter leaves cycles that hold a kernel's arguments
        return result

    call()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = attend(q, k, v, return_lse=True, **inputs)
    wanted = [q, k, v, out, lse, *inputs.values()]
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in wanted]
    gc.collect()
    assert measured(call).kept == bytes_of(out, lse)


def _launch_nothing(source: KernelSource, grid: tuple[int, int], arguments: Sequence[object]) -> None:
    """Launch nothing: kernels allocate no memory, but Triton's interpreter does."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dk", "dv"), [(32, 32), (64, 16), (33, 32), (32, 7), (9, 5)])
def test_a_plan_predicts_the_memory_of_a_call(dk: int, dv: int, dtype: torch.dtype) -> None:
    attend, (q, k, v) = compile_attention("causal", backend="triton"), draw_qkv(300, dk, dv, dtype)
    with started_by(_launch_nothing), pretending(TARGETS["sm_90"]):  # as no kernel runs, bf16 stays bf16
        attend(q, k, v)
        forward = measured(lambda: attend(q, k, v, return_lse=True))
        out, lse = forward.result
        grad_out = torch.randn_like(out)
        back = measured(lambda: torch.autograd.grad(out, (q, k, v), grad_out))
    planned: Any = attend.plan(300, heads=4, kv_heads=2, head_dim=dk, dtype=dtype, device="cuda")
    if dv != dk:
        from attnc.runtime.call.tensor_checks import check_tensors
        from attnc.runtime.executors.triton.gpu_plan import memory_on_gpu

        memory = memory_on_gpu(check_tensors(q, k, v))
    else:
        memory = planned.memory
    assert memory.saved == bytes_of(q, k, v, out, lse)
    for measured_peak, planned_peak in (
        (forward.peak - bytes_of(out, lse), memory.forward),
        (back.peak - bytes_of(*back.result), memory.backward),
    ):
        assert measured_peak <= planned_peak <= 1.5 * measured_peak, (
            f"{measured_peak} bytes at most, and the plan tells {planned_peak}"
        )


def test_dropped_kernels_leave_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Recent[Any] = Recent(1)
    monkeypatch.setattr(launch, "_FUNCTIONS", memory)
    heads = HeadShape(16, 16, "float32")
    kernels = gpu_planner(compile_attention("sliding_window", window=19)._core.planner).kernels(
        heads, TARGETS["sm_90"], True
    )
    sources = [kernels.forward, kernels.dq, kernels.dkdv]
    before = _texts()
    for source in (*sources, *sources):
        function = launch.function_of(source)
        assert launch.function_of(source) is function
        del function
        gc.collect()
        assert len(_texts() - before) == len(memory._values) == 1


def _texts() -> set[str]:
    return {name for name in linecache.cache if name.startswith("<attnc ")}
