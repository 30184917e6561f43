"""Borders in a recurrence that states must not cross: documents, `reset` lines, decays of 0.

Chunk forms multiply states behind a border by 0, which gives NaN if a state is not finite. Token by token a state is
replaced at a border, and a factor of 0 times infinity or NaN gives 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.runtime.call.device_targets import pretended

CROSSED = "NaN or overflow before a border (a document, a reset, a decay of 0), which chunks would carry across it"

_CLOSED = {"log_decay": -torch.inf, "unit": 0.0}
"""The value of a decay that leaves nothing of a state, by the refinement of its input."""


def may_have_borders(pattern: Pattern, begins_anew: bool, q: Tensor) -> bool:
    """Check whether there may be a border between tokens; on a GPU only documents and resets count."""
    return begins_anew or (not q.is_cuda and any(tensor.refinement in _CLOSED for tensor in pattern.tensors))


def may_be_crossed(
    pattern: Pattern, tensors: Sequence[Tensor], begins_anew: bool, out: Tensor, states: Sequence[Tensor]
) -> bool:
    """Check whether results hold NaN or numbers whose squares overflow, and there is a border that these may cross.

    Squares matter because gradients multiply states by their adjoints. `tensors`: the inputs of the pattern.
    `begins_anew`: states start anew before some token. On a GPU decays are not checked, because the host would wait for
    the device in every call.
    """
    gates = [x for declared, x in zip(pattern.tensors, tensors, strict=True) if declared.refinement in _CLOSED]
    if not begins_anew and (not gates or out.is_cuda):
        return False
    if pretended() is not None or (out.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False  # Kernels that are only collected have not written the result.
    low, high = _extremes(out)
    if -_largest_safe(out.dtype) <= low <= high <= _largest_safe(out.dtype) and not any(
        isnan(_extremes(x)[0]) for x in states
    ):
        return False
    return begins_anew or has_closed(pattern, tensors)


def has_closed(pattern: Pattern, tensors: Sequence[Tensor]) -> bool:
    """Check whether a decay of 0 leaves nothing of a state."""
    return any(
        bool((x.detach() == _CLOSED[declared.refinement]).any())
        for declared, x in zip(pattern.tensors, tensors, strict=True)
        if declared.refinement in _CLOSED
    )


def _extremes(x: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest number, or NaN if there is one."""
    x = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
    if not x.numel():
        return 0.0, 0.0
    low, high = torch.stack(x.aminmax()).tolist()
    return low, high


def unhidden(factor: Tensor, state: Tensor) -> Tensor:
    """Return a state to multiply by a factor: 0 where the factor is 0 and the state is NaN or its square overflows.

    Its gradient is 0 where the factor is 0 and the incoming gradient is not finite.
    """
    zero = factor.detach() == 0
    result = torch.where(zero & ~(state.detach().abs() <= _largest_safe(state.dtype)), 0, state)
    if result.requires_grad and bool(zero.any()):
        result.register_hook(lambda grad: torch.where(zero & ~grad.isfinite(), 0, grad))  # type: ignore[no-untyped-call]
    return result


def _largest_safe(dtype: torch.dtype) -> float:
    """Return the largest number whose square is finite in the dtype of computation, fp32 or wider."""
    return float(torch.finfo(torch.promote_types(dtype, torch.float32)).max ** 0.5)


__all__ = ["CROSSED", "may_be_crossed", "unhidden"]
