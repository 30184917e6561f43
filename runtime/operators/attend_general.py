"""`attnc::attend_general`: attention with its own scores, weights, values or branches as an operator of torch.

A traced call (`torch.compile`, `torch.export`) uses the operator; elsewhere executors run it as plain torch code. The
gradient is the operator `attnc::attend_general_backward`, which recomputes the forward: only q, k, v and the inputs are
saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula

from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.tensor_checks import check_tensors
from attnc.runtime.call.transforms import cast_for_autocast
from attnc.runtime.executors.cpu.autograd import FirstOrder, refuse_second
from attnc.runtime.executors.cpu.flash_kernel import lse_dtype
from attnc.runtime.executors.pattern_parts import parts_of
from attnc.runtime.executors.registry import executor_named
from attnc.runtime.fallbacks import COPY, note
from attnc.runtime.operators import FAKE
from attnc.runtime.operators.attend import Inputs, running, visible_pairs
from attnc.runtime.planning.planners import planner_of
from attnc.runtime.planning.plans import Planner
from attnc.runtime.process.profiling import profiled

_ATTEND = torch.ops.attnc.attend_general.default
_ATTEND_BACKWARD = torch.ops.attnc.attend_general_backward.default

Pair = tuple[Tensor, Tensor]


class _What(NamedTuple):
    """The text of a pattern, and the scale."""

    pattern: str
    scale: float | None


def attend(q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], planner: Planner, scale: float | None) -> Pair:
    """Compute (out, lse) as one node of a graph; the LSE is empty where there is none."""
    q, k, v = cast_for_autocast(planner.pattern.name, q, k, v)
    check_tensors(q, k, v)  # before tracing
    return cast("Pair", _ATTEND(q, k, v, tensors or None, planner.text, scale))


# --- kernels ---------------------------------------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, pattern: str, scale: float | None) -> Pair:
    executor, planner, call = run = running(q, k, v, inputs, pattern, scale)
    with torch.no_grad(), profiled(run.name):
        out, lse, _ = executor.forward(planner, call)
    return contiguous(run.name, "out", out), _no_lse(q) if lse is None else contiguous(run.name, "lse", lse)


def contiguous(pattern: str, name: str, x: Tensor) -> Tensor:
    """Return a result in the layout that the operator promises; `pattern` and `name` name it in the fallback note."""
    if x.is_contiguous():
        return x
    note(pattern, COPY, f"{name}: a node of a graph gives it heads before tokens, and q has tokens before heads")
    return x.contiguous()


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty((0,), dtype=lse_dtype(q.dtype))


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Inputs,
    pattern: str,
    scale: float | None,
) -> list[Tensor]:
    """Return the gradients of q, k, v and of the real inputs in their order."""
    executor, planner, call = running(q, k, v, inputs, pattern, scale)
    with _recording():
        gradients = executor.backward(planner, call, None, (grad_out, grad_lse))
    return [grad.contiguous() for grad in gradients]


@contextmanager
def _recording() -> Iterator[None]:
    """Enable autograd, which torch disables below an operator."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (DispatchKey.AutogradFunctionality, DispatchKey.AutogradOther, DispatchKey.AutogradNestedTensor):
        exclude = exclude - DispatchKeySet(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


# --- fake kernels ----------------------------------------------------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, pattern: str, scale: float | None) -> Pair:
    check_tensors(q, k, v)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    if not parts_of(planner_of(pattern)).has_lse:
        return out, _no_lse(q)
    return out, q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))


def _fake_backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, *_: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, *(inputs or ())) if x.is_floating_point()]


# --- autograd --------------------------------------------------------------------------------------------------------


class _RecordedOperator(FirstOrder):
    """The forward operator as an autograd function."""

    @staticmethod
    def forward(ctx: Any, what: _What, *tensors: Tensor) -> Pair:
        ctx.what = what
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        q, k, v, *inputs = tensors
        with torch._C._AutoDispatchBelowAutograd():
            return cast("Pair", _ATTEND(q, k, v, inputs or None, *what))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grads
        tensors = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * (1 + len(tensors))
        return (None, *_gradients_by_tensor(_Gradient.apply(ctx.what, grad_out, grad_lse, *tensors), tensors))  # type: ignore[no-untyped-call]


class _Gradient(FirstOrder):
    """The backward operator as an autograd function, which is not differentiable again."""

    @staticmethod
    def forward(ctx: Any, what: _What, grad_out: Tensor | None, grad_lse: Tensor | None, *tensors: Tensor) -> Any:
        q, k, v, *inputs = tensors
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_ATTEND_BACKWARD(grad_out, grad_lse, q, k, v, inputs or None, *what))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        refuse_second()


def _gradients_by_tensor(grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """Yield the gradient of each tensor in order, None for integer tensors."""
    left = iter(grads)
    return (next(left) if x.is_floating_point() else None for x in tensors)


def _forward_recorded(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, pattern: str, scale: float | None) -> Pair:
    what = _What(pattern, scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *(inputs or ()))):
        return cast("Pair", _RecordedOperator.apply(what, q, k, v, *(inputs or ())))  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return cast("Pair", _ATTEND(q, k, v, inputs or None, *what))


def _forward_under_autocast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Pair:
    q, k, v = cast_for_autocast(planner_of(rest[1]).pattern.name, q, k, v)
    keys = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return cast("Pair", _ATTEND(q, k, v, *rest))


# --- FLOPs ------- ---------------------------------------------------------------------------------------------------


def _forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Inputs,
    pattern: str,
    scale: float | None,
    out_val: object = None,
) -> int:
    """Return the FLOPs of Q Kᵀ and P V over the visible pairs of every attention, whatever its scores are."""
    return 2 * _pairs(q, k, v, inputs, pattern) * (q.shape[3] + v.shape[3])


def _backward_flops(
    grad_out: object,
    grad_lse: object,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Inputs,
    pattern: str,
    scale: float | None,
    out_val: object = None,
) -> int:
    """Return the FLOPs of the recomputed forward and the backward, which is 2.5 times the forward for dk = dv."""
    return 2 * _pairs(q, k, v, inputs, pattern) * (4 * q.shape[3] + 3 * v.shape[3])


def _pairs(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, pattern: str) -> int:
    if any(is_fake(x) for x in inputs or ()):
        raise UnsupportedError(
            "the FLOPs of a pattern with inputs depend on their data, which fake tensors do not have"
        )
    _, planner, call = running(q, k, v, inputs, pattern, None)
    plan = executor_named("cpu").plan(planner, call.sizes, call.inputs)
    return sum(
        visible_pairs(branch_plan) for branch_plan in ([plan] if not plan.branches else [p for _, p in plan.branches])
    )


KERNELS = {
    ("attend_general", "CPU"): _forward,
    ("attend_general", "CUDA"): _forward,
    ("attend_general", "Autograd"): _forward_recorded,
    ("attend_general", "AutocastCPU"): _forward_under_autocast,
    ("attend_general", "AutocastCUDA"): _forward_under_autocast,
    ("attend_general", FAKE): _fake_forward,
    ("attend_general_backward", "CPU"): _backward,
    ("attend_general_backward", "CUDA"): _backward,
    ("attend_general_backward", FAKE): _fake_backward,
}
"""The kernels that `attnc.runtime.operators` calls."""
register_flop_formula(torch.ops.attnc.attend_general, get_raw=True)(_forward_flops)
register_flop_formula(torch.ops.attnc.attend_general_backward, get_raw=True)(_backward_flops)
