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
from torch.utils.flop_counter import register_flop_formula
from typing_extensions import Unpack

from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.sharded import refuse_shards
from attnc.runtime.call.tensor_checks import check_tensors
from attnc.runtime.call.transforms import cast_for_autocast, needs_record
from attnc.runtime.executors.cpu import flash_kernel
from attnc.runtime.executors.cpu.autograd import Pair, Triple, differentiable, gradient
from attnc.runtime.executors.cpu.cpu_executor import empty_like
from attnc.runtime.executors.executor_protocol import Executor
from attnc.runtime.executors.registry import executor_named
from attnc.runtime.operators import FAKE
from attnc.runtime.planning.planners import planner_of
from attnc.runtime.planning.plans import Planner
from attnc.runtime.process.profiling import profiled
from attnc.runtime.settings import SETTINGS

Inputs: TypeAlias = "Sequence[Tensor] | None"
"""A list of tensors of an operator: None for an empty list, because AOTInductor drops empty lists."""

Call: TypeAlias = "tuple[Inputs, str, float | None]"
"""The pattern's inputs in its order, its text, and the scale."""

_ATTEND = torch.ops.attnc.attend.default
_ATTEND_BACKWARD = torch.ops.attnc.attend_backward.default


def attend(q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor], planner: Planner, scale: float | None) -> Pair:
    """Return (out, lse) under a plain pattern by the operator, for calls that torch traces, transforms or observes.

    q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → out (B, Hq, Nq, dv) in their dtype, lse (B, Hq, Nq) fp32
    (fp64 for fp64). Raises what a call of an `Attention` raises.
    """
    if torch.compiler.is_compiling() or not (q.is_cpu and k.is_cpu and v.is_cpu):  # check before tracing
        q, k, v = cast_for_autocast(planner.pattern.name, q, k, v)
        check_tensors(q, k, v)
    if torch._C._are_functorch_transforms_active():  # handled here, before the dispatcher wraps the tensors
        return differentiable(q, k, v, _Seen(planner.text, scale), inputs)
    return cast("Pair", _ATTEND(q, k, v, inputs or None, planner.text, scale))


# --- kernels ---------------------------------------------------------------------------------------------------------


class Running(NamedTuple):
    """An operator's call: the executor of its device, the planner of its pattern, and its arguments."""

    executor: Executor
    planner: Planner
    call: CallArguments

    @property
    def name(self) -> str:
        """The pattern's name."""
        return self.planner.pattern.name


def running(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, pattern: str, scale: float | None) -> Running:
    """Return the call that an operator's arguments describe. Raises UnsupportedError inside `context_parallel`."""
    refuse_shards()
    planner = planner_of(pattern)
    named = {tensor.name: x for tensor, x in zip(planner.pattern.tensors, inputs or (), strict=True)}
    factor = float(q.shape[3] ** -0.5) if scale is None else scale
    call = CallArguments(q, k, v, named, named, factor, passed_scale=scale)
    return Running(executor_named("triton" if q.is_cuda else "cpu"), planner, call)


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Unpack[Call]) -> Pair:
    executor, planner, call = run = running(q, k, v, *arguments)
    with torch.no_grad(), profiled(run.name):
        out, lse, _ = executor.forward(planner, call)
    assert lse is not None
    return out, lse


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *arguments: Unpack[Call],
) -> Triple:
    executor, planner, call = run = running(q, k, v, *arguments)
    with profiled(run.name, "backward"):
        return cast("Triple", executor.backward(planner, call, (out, lse), (grad_out, grad_lse)))


# --- fake kernels ----------------------------------------------------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *call: Unpack[Call]) -> Pair:
    check_tensors(q, k, v)
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


def _forward_recorded(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, pattern: str, scale: float | None) -> Pair:
    _refuse_transforms()
    work, inputs = _Seen(pattern, scale), inputs or ()
    if not needs_record(q, k, v):
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
    _, planner, arguments = running(q, k, v, *call)
    return visible_pairs(executor_named("cpu").plan(planner, arguments.sizes, arguments.inputs))


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
    ("attend", "CUDA"): _forward,
    ("attend", "AutocastCPU"): _forward_under_autocast,
    ("attend", "AutocastCUDA"): _forward_under_autocast,
    ("attend", "FuncTorchBatched"): _refuse_transforms,
    ("attend", FAKE): _fake_forward,
    ("attend_backward", "CPU"): _backward,
    ("attend_backward", "CUDA"): _backward,
    ("attend_backward", "Autograd"): _backward_recorded,
    ("attend_backward", "FuncTorchBatched"): _refuse_transforms,
    ("attend_backward", FAKE): _fake_backward,
}
"""The kernels that `attnc.runtime.operators` calls."""
register_flop_formula(torch.ops.attnc.attend, get_raw=True)(_forward_flops)
register_flop_formula(torch.ops.attnc.attend_backward, get_raw=True)(_backward_flops)
