"""Borders in a recurrence that NaN and overflow must not cross: documents, `reset` lines, decays of 0.

Chunk forms multiply states behind a border by 0, which gives NaN if a state is not finite. Token by token a state is
replaced at a border, and a factor of 0 times infinity or NaN gives 0.

A backward pass by chunks multiplies gradients behind a border by 0, and 0 · NaN is NaN. If an incoming gradient is not
finite, the pass runs twice. The first pass has finite numbers in place of non-finite gradients and zeros elsewhere: its
result is 0 behind borders, and nonzero where the gradient must be NaN. The second pass, autograd's own, has zeros in
place of non-finite gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from attnc.compiler.ir import Pattern
from attnc.runtime.call.device_targets import pretended
from attnc.runtime.executors.cpu.autograd import FirstOrder
from attnc.runtime.executors.cpu.hidden_values import is_finite
from attnc.runtime.executors.recurrent.call_tokens import CallTokens
from attnc.runtime.fallbacks import HOST_WAIT, note

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


States = dict[str, Tensor]
Run = Callable[[CallTokens, States], tuple[Tensor, States]]


def with_borders(name: str, run: Run, tokens: CallTokens, states: States) -> tuple[Tensor, States]:
    """Call `run` and return its (out, last states), with NaN gradients kept from crossing borders.

    `name`: the pattern's name, for fallbacks.
    """
    arguments = [*tokens.real, *states.values()]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in arguments)
    if not recorded or torch._C._are_functorch_transforms_active():
        return run(tokens, states)
    views = [x.view_as(x) if x.requires_grad else x for x in arguments]
    count = len(tokens.real)
    out, last = run(tokens.having(views[:count]), dict(zip(states, views[count:], strict=True)))
    results = [out, *last.values()]
    if not any(x.requires_grad for x in results):
        return out, last
    out, *last_results = _Checked.apply(name, len(results), *results, *views)  # type: ignore[no-untyped-call]
    return out, dict(zip(last, last_results, strict=True))


class _Checked(FirstOrder):
    """The results of a call, unchanged; the further operands are the arguments of the call.

    The arguments get a gradient from here only if an incoming gradient is not finite: NaN where it reaches, else 0.
    """

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name, ctx.count = name, count
        ctx.set_materialize_grads(False)
        results = [x.detach() for x in tensors[:count]]
        ctx.mark_non_differentiable(*(y for x, y in zip(tensors, results, strict=False) if not x.requires_grad))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        edges = [None if node is None else GradientEdge(node, at) for node, at in ctx.next_functions]
        result_edges, argument_edges = edges[: ctx.count], edges[ctx.count :]
        if _finite_or_captured(ctx.name, [grad for grad in grads if grad is not None]):
            return (None, None, *grads, *[None] * len(argument_edges))
        finite = [None if grad is None else grad.isfinite() for grad in grads]
        marks = _marks(result_edges, argument_edges, finite, grads)
        return (None, None, *map(_cleaned, finite, grads), *marks)


def _finite_or_captured(name: str, grads: Sequence[Tensor]) -> bool:
    """Check whether the gradients are finite; true without a check while a CUDA graph is captured."""
    if not grads:
        return True
    if grads[0].is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return True
        note(name, HOST_WAIT, "gradients at borders of documents and at a `reset` are checked to be finite")
    real = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in grads)
    return is_finite(*(x.detach() for x in real))


def _marks(
    ends: Sequence[GradientEdge | None],
    arguments: Sequence[GradientEdge | None],
    finite: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return gradients of the arguments: NaN where a non-finite incoming gradient contributes, else 0."""
    pairs = [
        (end, torch.where(is_finite_mask, 0, _nonzero_like(is_finite_mask).to(grad.dtype)))
        for end, is_finite_mask, grad in zip(ends, finite, grads, strict=True)
        if end is not None and is_finite_mask is not None and grad is not None
    ]
    reached = [edge for edge in arguments if edge is not None]
    start_gradients = [grad for _, grad in pairs]
    # Keep the graph's buffers for the pass that follows, which frees them or not as its caller asked.
    contributions = torch.autograd.grad(
        [end for end, _ in pairs], reached, start_gradients, retain_graph=True, allow_unused=True
    )
    remaining = iter(contributions)
    return [None if edge is None else _nan_marks(next(remaining)) for edge in arguments]


def _nan_marks(mark: Tensor | None) -> Tensor | None:
    """Return NaN where `mark` is nonzero, else 0."""
    return None if mark is None else torch.zeros_like(mark).masked_fill_(mark != 0, math.nan)


def _cleaned(finite: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Return a gradient with 0 in place of non-finite entries."""
    return None if finite is None or grad is None else torch.where(finite, grad, 0)


def _nonzero_like(like: Tensor) -> Tensor:
    """Return irregular numbers between 0.5 and 2.5, so that sums of a few do not cancel."""
    return (torch.arange(like.numel(), device=like.device, dtype=torch.float64).cos() + 1.5).reshape(like.shape)
