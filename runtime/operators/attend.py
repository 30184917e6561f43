"""`attnc::attend` and `attnc::attend_backward`: attention as operators of torch.

Every part of torch that observes operators sees these: `torch.compile`, `torch.export`, autocast, selective
checkpointing, the FLOP counter. The arguments describe a call completely: tensors, the pattern as text (`identity`),
and the scale (None: dk^-1/2). Where nothing observes, a call goes straight to autograd and the executor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula
from typing_extensions import Unpack

from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.sharded import refuse_shards
from attnc.runtime.call.tensor_checks import check_tensors
from attnc.runtime.call.transforms import cast_for_autocast, is_forward_mode, wide_in_interpreter
from attnc.runtime.executors.cpu import flash_kernel
from attnc.runtime.executors.cpu.autograd import (
    Pair,
    Planned,
    Triple,
    differentiable,
    gradient,
)
from attnc.runtime.executors.cpu.cpu_executor import Need, empty_like
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.executors.cpu.direct import direct_of
from attnc.runtime.operators import FAKE
from attnc.runtime.planning.planners import planner_of
from attnc.runtime.planning.plans import Planner
from attnc.runtime.process.profiling import NamedCall, profiled
from attnc.runtime.settings import SETTINGS

Inputs: TypeAlias = "Sequence[Tensor] | None"
"""A list of tensors of an operator: None for an empty list, because AOTInductor drops empty lists."""

Call: TypeAlias = "tuple[Inputs, str, float | None]"
"""The pattern's inputs in its order, its text, and the scale."""

_ATTEND = torch.ops.attnc.attend.default
_ATTEND_BACKWARD = torch.ops.attnc.attend_backward.default


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Sequence[Tensor],
    planner: Planner,
    scale: float | None,
    *,
    return_lse: bool = True,
) -> Pair:
    """Return (out, lse) under a pattern; bypasses the operator where nothing observes, as dispatch slows small calls.

    q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → out (B, Hq, Nq, dv) in their dtype, lse (B, Hq, Nq) fp32
    (fp64 for fp64); without `return_lse` only the backward can use it. Raises what a call of an `Attention` raises.
    """
    traced = torch.compiler.is_compiling()
    if traced or not (q.is_cpu and k.is_cpu and v.is_cpu):  # check shapes and devices before tracing
        q, k, v = cast_for_autocast(planner.pattern.name, q, k, v)
        check_tensors(q, k, v)
        refuse_device(q)
    if torch._C._are_functorch_transforms_active():  # handled here, before the dispatcher wraps the tensors
        return differentiable(q, k, v, _Seen(planner.text, scale), inputs)
    if traced or _is_observed(q, k, v):
        return cast("Pair", _ATTEND(q, k, v, inputs or None, planner.text, scale))
    recorded = _needs_record(q, k, v)
    need: Need = "lse" if return_lse else "backward" if recorded else "out"
    plans = cpu_plans(planner)
    planned = Planned(plans.plan_of(q, k, v, inputs), _scale(q, scale), need)
    if not recorded:
        pair = planned.forward(q, k, v, inputs)
        if not (inputs or return_lse):
            plans.direct = direct_of(q, k, v, planned.plan, scale, planned.scale, pair[0]) or plans.direct
        return pair
    return differentiable(q, k, v, _Unseen(planned, planner.text, scale), inputs)


def by_kernels(
    q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], planner: Planner, scale: float | None
) -> Pair:
    """Return (out, lse) by the triton executor, on a CPU in Triton's interpreter, differentiable once.

    Raises what a call of an `Attention` raises.
    """
    from attnc.runtime.executors.triton.gpu_work import OnGpu  # only where kernels run

    q, k, v = cast_for_autocast(planner.pattern.name, q, k, v)
    check_tensors(q, k, v)
    dtype = q.dtype
    q, k, v = wide_in_interpreter(planner.pattern.name, q, k, v)
    with NamedCall(planner.pattern.name):
        out, lse = differentiable(q, k, v, OnGpu(planner, _scale(q, scale)), inputs)
    return out.to(dtype), lse


def refuse_device(q: Tensor) -> None:
    """Raise UnsupportedError where neither the cpu executor nor kernels run."""
    if q.device.type not in ("cpu", "meta", "cuda"):
        raise UnsupportedError(
            f'q is on {q.device}, which is not supported; use backend="reference" (dense, O(Nq · Nk)), or move '
            f"the tensors to the CPU"
        )


# --- kernels ---------------------------------------------------------------------------------------------------------


def _planned(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, pattern: str, scale: float | None) -> Planned:
    refuse_shards()
    return Planned(cpu_plans(planner_of(pattern)).plan_of(q, k, v, inputs or ()), _scale(q, scale))


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[3] ** -0.5) if scale is None else scale


def _forward(q: Tensor, k: Tensor, v: Tensor, *call: Unpack[Call]) -> Pair:
    _, pattern, _ = call
    with profiled(planner_of(pattern).pattern.name):
        return _planned(q, k, v, *call).forward(q, k, v, ())


def _forward_on_gpu(q: Tensor, k: Tensor, v: Tensor, *call: Unpack[Call]) -> Pair:
    from attnc.runtime.executors.triton.gpu_work import OnGpu  # only where kernels run

    refuse_shards()
    inputs, pattern, scale = call
    with profiled(planner_of(pattern).pattern.name):
        return OnGpu(planner_of(pattern), _scale(q, scale)).forward(q, k, v, inputs or ())


def _backward_on_gpu(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *call: Unpack[Call],
) -> Triple:
    from attnc.runtime.executors.triton.gpu_work import OnGpu  # only where kernels run

    inputs, pattern, scale = call
    work = OnGpu(planner_of(pattern), _scale(q, scale))
    with profiled(planner_of(pattern).pattern.name, "backward"):
        return work.backward(grad_out, grad_lse, (q, k, v, out, lse, *(inputs or ())))


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *call: Unpack[Call],
) -> Triple:
    _, pattern, _ = call
    with profiled(planner_of(pattern).pattern.name, "backward"):
        return _planned(q, k, v, *call).backward(grad_out, grad_lse, (q, k, v, out, lse))


# --- fake kernels ----------------------------------------------------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *call: Unpack[Call]) -> Pair:
    check_tensors(q, k, v)
    refuse_device(q)
    rows = q.shape[:3]
    lse = empty_like(q, rows, flash_kernel.lse_dtype(q.dtype))
    if q.is_cuda:  # kernels write the LSE head by head
        lse = q.new_empty(rows, dtype=lse.dtype)
    return empty_like(q, (*rows, v.shape[3]), q.dtype), lse


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    return tuple(empty_like(x, x.shape, x.dtype) for x in (q, k, v))


# --- autograd --------------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """Attention by the operators themselves, below autograd."""

    pattern: str
    scale: float | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        with torch._C._AutoDispatchBelowAutograd():
            return cast("Pair", _ATTEND(q, k, v, inputs or None, self.pattern, self.scale))

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        with torch._C._AutoDispatchBelowAutograd():
            results = _ATTEND_BACKWARD(grad_out, grad_lse, *kept[:5], kept[5:] or None, self.pattern, self.scale)
        return cast("Triple", results)


class _Unseen(NamedTuple):
    """Attention by the executor; the backward uses the operator where something observes it."""

    planned: Planned
    pattern: str
    scale: float | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        return self.planned.forward(q, k, v, inputs)

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        if _is_observed(*kept[:3]):  # the operator adds the profiler row
            return _Seen(self.pattern, self.scale).backward(grad_out, grad_lse, kept)
        with profiled(self.planned.plan.pattern, "backward"):
            return self.planned.backward(grad_out, grad_lse, kept)


def _is_observed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Check whether autocast, a dispatch mode or a tensor subclass must see the operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch.is_autocast_enabled("cpu")
        or not (_is_plain(q) and _is_plain(k) and _is_plain(v))
    )


def _is_plain(x: Tensor) -> bool:
    return (type(x) is Tensor or type(x) is Parameter) and x.is_cpu


def _needs_record(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)) or is_forward_mode()


def _forward_recorded(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, pattern: str, scale: float | None) -> Pair:
    _refuse_transforms()
    work, inputs = _Seen(pattern, scale), inputs or ()
    if not _needs_record(q, k, v):
        return work.forward(q, k, v, inputs)
    return differentiable(q, k, v, work, inputs)


def _backward_recorded(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    inputs: Inputs,
    pattern: str,
    scale: float | None,
) -> Triple:
    _refuse_transforms()
    return gradient(grad_out, grad_lse, (q, k, v, out, lse, *(inputs or ())), _Seen(pattern, scale))


# --- transforms ------------------------------------------------------------------------------------------------------


def _forward_under_autocast(q: Tensor, k: Tensor, v: Tensor, *call: Unpack[Call]) -> Pair:
    _, pattern, _ = call
    q, k, v = cast_for_autocast(planner_of(pattern).pattern.name, q, k, v)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    keys = keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return cast("Pair", _ATTEND(q, k, v, *call))


def _refuse_transforms(*arguments: Any) -> None:
    """Raise UnsupportedError inside torch.func, where gradients of more than one level would be lost silently."""
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            "torch.func over the operator attnc::attend is not supported: transform a function that calls the "
            "Attention, not one that is compiled or exported"
        )


# --- FLOPs ------- ---------------------------------------------------------------------------------------------------


def _forward_flops(q: Tensor, k: Tensor, v: Tensor, *call: Unpack[Call], out_val: object = None) -> int:
    """Return the FLOPs of Q Kᵀ and P V over the visible pairs."""
    return 2 * _visible_pairs(q, k, v, *call) * (q.shape[3] + v.shape[3])


def _backward_flops(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *call: Unpack[Call],
    out_val: object = None,
) -> int:
    """Return the FLOPs of Q Kᵀ, dO Vᵀ, Pᵀ dO, dS K and dSᵀ Q over visible pairs: 2.5 times the forward for dk = dv."""
    return 2 * _visible_pairs(q, k, v, *call) * (3 * q.shape[3] + 2 * v.shape[3])


def _visible_pairs(q: Tensor, k: Tensor, v: Tensor, *call: Unpack[Call]) -> int:
    """Return the number of visible pairs of a call, over batch and heads."""
    inputs, *_ = call
    if any(is_fake(x) for x in inputs or ()):
        raise UnsupportedError(
            "the FLOPs of a pattern with inputs depend on their data, which fake tensors do not have"
        )
    return visible_pairs(_planned(q, k, v, *call).plan)


def visible_pairs(plan: Plan) -> int:
    """Return the number of visible pairs of a plan, over batch and heads."""
    return _counted(plan) if plan.visible is None else plan.visible


def _counted(plan: Plan) -> int:
    rows = max(1, SETTINGS.exact_elements // max(plan.n_k, 1))
    return sum(
        len(group.batches)
        * len(group.heads)
        * int(plan.exact_mask(group.batches[0], group.heads[0], row, min(row + rows, plan.n_q), 0, plan.n_k).sum())
        for group in plan.groups
        for row in range(0, plan.n_q, rows)
    )


# --- registrations ---------------------------------------------------------------------------------------------------

KERNELS = {
    ("attend", "CPU"): _forward,
    ("attend", "Autograd"): _forward_recorded,
    ("attend", "CUDA"): _forward_on_gpu,
    ("attend", "AutocastCPU"): _forward_under_autocast,
    ("attend", "AutocastCUDA"): _forward_under_autocast,
    ("attend", "FuncTorchBatched"): _refuse_transforms,
    ("attend", FAKE): _fake_forward,
    ("attend_backward", "CPU"): _backward,
    ("attend_backward", "CUDA"): _backward_on_gpu,
    ("attend_backward", "Autograd"): _backward_recorded,
    ("attend_backward", "FuncTorchBatched"): _refuse_transforms,
    ("attend_backward", FAKE): _fake_backward,
}
"""The kernels that `attnc.runtime.operators` calls."""
register_flop_formula(torch.ops.attnc.attend, get_raw=True)(_forward_flops)
register_flop_formula(torch.ops.attnc.attend_backward, get_raw=True)(_backward_flops)
