"""Borders in a recurrence that states must not cross: documents, `reset` lines, decays that leave nothing.

Forms by chunks multiply what a border hides by 0, which is NaN for what is not finite. Token by token a state is
replaced at a border, and what a factor of 0 leaves of infinity or NaN is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.runtime.gpu.device_targets import pretended

CROSSED = "NaN or overflow before a border (a document, a reset, a decay of 0), which by chunks would cross it"

_CLOSED = {"log_decay": -torch.inf, "unit": 0.0}


def may_have_borders(pattern: Pattern, begins_anew: bool, q: Tensor) -> bool:
    """Whether tokens may have a border between them; on a GPU only documents and resets count."""
    return begins_anew or (not q.is_cuda and any(one.refinement in _CLOSED for one in pattern.tensors))


def may_be_crossed(
    pattern: Pattern, tensors: Sequence[Tensor], begins_anew: bool, out: Tensor, states: Sequence[Tensor]
) -> bool:
    """Whether a result holds numbers that overflow, or whose squares do, and tokens have a border to cross.

    Squares, as gradients multiply states by their adjoints. `tensors`: the inputs of the pattern. `begins_anew`: some
    token begins anew. On a GPU decays are not looked at, as the host would wait for the device in every call.
    """
    gates = [x for one, x in zip(pattern.tensors, tensors, strict=True) if one.refinement in _CLOSED]
    if not begins_anew and (not gates or out.is_cuda):
        return False
    if pretended() is not None or (out.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False  # Kernels that are only collected have not written the result.
    low, high = _ends(out)
    if -_most(out.dtype) <= low <= high <= _most(out.dtype) and not any(isnan(_ends(x)[0]) for x in states):
        return False
    return begins_anew or has_closed(pattern, tensors)


def has_closed(pattern: Pattern, tensors: Sequence[Tensor]) -> bool:
    """Whether a decay leaves nothing of a state."""
    return any(
        bool((x.detach() == _CLOSED[one.refinement]).any())
        for one, x in zip(pattern.tensors, tensors, strict=True)
        if one.refinement in _CLOSED
    )


def _ends(x: Tensor) -> tuple[float, float]:
    """The least and the largest number, NaN where there is one."""
    x = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
    if not x.numel():
        return 0.0, 0.0
    low, high = torch.stack(x.aminmax()).tolist()
    return low, high


def unhidden(factor: Tensor, state: Tensor) -> Tensor:
    """Return a state to be multiplied by a factor: 0 where the factor is 0 and the state, or its square, overflows.

    Its gradient is 0 where the factor is 0 and the gradient is no number.
    """
    zero = factor.detach() == 0
    result = torch.where(zero & ~(state.detach().abs() <= _most(state.dtype)), 0, state)
    if result.requires_grad and bool(zero.any()):
        result.register_hook(lambda grad: torch.where(zero & ~grad.isfinite(), 0, grad))  # type: ignore[no-untyped-call]
    return result


def _most(dtype: torch.dtype) -> float:
    """The largest number whose square is finite in what is computed with."""
    return float(torch.finfo(torch.promote_types(dtype, torch.float32)).max ** 0.5)


__all__ = ["CROSSED", "may_be_crossed", "unhidden"]
