"""Gradients of a recurrence whose tokens have borders between them: NaN of one side reaches nothing on the other.

A backward pass by chunks multiplies what a border hides by 0, and 0 · NaN is NaN. Where an incoming gradient is not
finite, the pass runs twice: first with numbers there and zeros elsewhere, which gives 0 behind a border, and everywhere
else tells which gradients are no numbers; then, as autograd's own, with zeros in place of what is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from attnc.runtime.cpu.autograd import FirstOrder
from attnc.runtime.cpu.hidden_values import is_finite
from attnc.runtime.fallbacks import HOST_WAIT, note
from attnc.runtime.recurrent.call_tokens import CallTokens

States = dict[str, Tensor]
Run = Callable[[CallTokens, States], tuple[Tensor, States]]


def with_borders(name: str, run: Run, tokens: CallTokens, states: States) -> tuple[Tensor, States]:
    """Call `run` and return its (out, last states) with gradients kept apart at borders; `name`: of the pattern."""
    given = [*tokens.real, *states.values()]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if not recorded or torch._C._are_functorch_transforms_active():
        return run(tokens, states)
    own = [x.view_as(x) if x.requires_grad else x for x in given]
    count = len(tokens.real)
    out, last = run(tokens.having(own[:count]), dict(zip(states, own[count:], strict=True)))
    ends = [out, *last.values()]
    if not any(x.requires_grad for x in ends):
        return out, last
    out, *rest = _Checked.apply(name, len(ends), *ends, *own)  # type: ignore[no-untyped-call]
    return out, dict(zip(last, rest, strict=True))


class _Checked(FirstOrder):
    """The results of a call, unchanged; its other operands are what the call was given.

    Those get a gradient from here only where an incoming one is not finite: NaN where theirs is no number, else 0.
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
        ends, given = edges[: ctx.count], edges[ctx.count :]
        if _may_be_finite(ctx.name, [grad for grad in grads if grad is not None]):
            return (None, None, *grads, *[None] * len(given))
        finite = [None if grad is None else grad.isfinite() for grad in grads]
        marks = _marks(ends, given, finite, grads)
        return (None, None, *map(_cleaned, finite, grads), *marks)


def _may_be_finite(name: str, grads: Sequence[Tensor]) -> bool:
    """Whether the gradients are finite, or the host must not ask the device."""
    if not grads:
        return True
    if grads[0].is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return True
        note(name, HOST_WAIT, "gradients behind a document's border or a `reset` are checked to be finite")
    real = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in grads)
    return is_finite(*(x.detach() for x in real))


def _marks(
    ends: Sequence[GradientEdge | None],
    given: Sequence[GradientEdge | None],
    finite: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """NaN in the gradients of what was given where a gradient that is not finite has a part, else 0."""
    pairs = [
        (end, torch.where(here, 0, _drawn(here).to(grad.dtype)))
        for end, here, grad in zip(ends, finite, grads, strict=True)
        if end is not None and here is not None and grad is not None
    ]
    wanted = [edge for edge in given if edge is not None]
    drawn = [grad for _, grad in pairs]
    # The buffers stay for the pass that follows; that one frees them, or not, as its caller says.
    found = torch.autograd.grad([end for end, _ in pairs], wanted, drawn, retain_graph=True, allow_unused=True)
    rest = iter(found)
    return [None if edge is None else _no_numbers(next(rest)) for edge in given]


def _no_numbers(mark: Tensor | None) -> Tensor | None:
    return None if mark is None else torch.zeros_like(mark).masked_fill_(mark != 0, math.nan)


def _cleaned(finite: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return None if finite is None or grad is None else torch.where(finite, grad, 0)


def _drawn(like: Tensor) -> Tensor:
    """Numbers of which no sum of a few is 0."""
    return (torch.arange(like.numel(), device=like.device, dtype=torch.float64).cos() + 1.5).reshape(like.shape)


__all__ = ["with_borders"]
