"""Calls that are one kernel call on unmodified q, k and v: remembered, so that the next such call goes straight there.

Besides its kernel, a small call mostly pays for reloading code and data that the previous kernel evicted from caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.call.transforms import is_forward_mode
from attnc.runtime.executors.cpu import flash_kernel
from attnc.runtime.executors.cpu.bound_plan import program_of
from attnc.runtime.executors.cpu.hidden_values import is_finite

# Looked up once, not at every call through torch's large modules.
_are_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled
_STRIDED = torch.strided


@dataclass(frozen=True, slots=True)
class Direct:
    """A call without inputs and without a requested LSE: its layout, and the arguments of its kernel.

    `layout`: `_layout_of` its tensors; `scale`: as the caller passed it; `factor`: the scale in effect.
    """

    layout: tuple[Any, ...]
    scale: float | None
    factor: float
    additive: Tensor | None
    causal: bool

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor | None:
        """Return the output of an equal call; None for other calls, and if torch has to do more than compute."""
        if not (
            type(q) is type(k) is type(v) is Tensor
            and q.is_cpu
            and k.is_cpu
            and v.is_cpu
            and q.layout is k.layout is v.layout is _STRIDED
        ):
            return None
        if is_watched(q, k, v) or _layout_of(q, k, v) != self.layout:
            return None
        if type(scale) is not type(self.scale) or scale != self.scale:
            return None
        out = flash_kernel.attend(q, k, v, self.additive, self.causal, self.factor)[0]
        return out if is_finite(out) else None


def direct_of(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None, factor: float, out: Tensor
) -> Direct | None:
    """Return the record of a call whose output was `out`; None if the call did more than one kernel call."""
    if plan.batch != 1 or len(plan.groups) != 1 or len(plan.groups[0].pieces) != 1 or torch._C._is_tracing():
        return None  # sizes are tensors in a trace, and tracing again must take the same path
    if plan.fallback is not None:
        return None  # the fallback is counted in every call
    visible = program_of(plan).kept(q.dtype)
    if visible is None or visible.nothing or visible.blind is not None:
        return None
    if (
        q.shape[3] != v.shape[3]
        or not all(map(flash_kernel.is_fit, (q, k, v)))
        or out.stride() != flash_kernel.strides_of_out(q)
    ):
        return None
    return Direct(_layout_of(q, k, v), scale, factor, visible.additive, visible.causal)


def _layout_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    return q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype


def is_watched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Check whether a transform, a dispatch mode, autocast or autograd acts on the call."""
    return (
        _are_transforms_active()
        or _dispatch_modes() > 0
        or _is_autocast_enabled()
        or (_is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        or is_forward_mode()
    )
