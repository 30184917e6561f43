"""Gradients of a recurrence whose tokens have borders between them: NaN of one side reaches nothing on the other.

A backward pass by chunks multiplies what a border hides by 0, and 0 · NaN is NaN. Where an incoming gradient is not
finite, the pass runs twice: with zeros in place of what is not finite, and with numbers there and zeros elsewhere. What
the second gives is 0 behind a border, and everywhere else tells which gradients are no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from attnc.runtime.cpu.autograd import FirstOrder, once
from attnc.runtime.cpu.hidden_values import is_finite
from attnc.runtime.recurrent.tokens import Tokens

States = dict[str, Tensor]
Run = Callable[[Tokens, States], tuple[Tensor, States]]


def with_borders(run: Run, tokens: Tokens, states: States) -> tuple[Tensor, States]:
    """What `run` gives, (out, the last states), differentiable once; see above."""
    given = [*tokens.real, *states.values()]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if not recorded or torch._C._are_functorch_transforms_active():
        return run(tokens, states)
    out, *last = _Bordered.apply(run, tokens, tuple(states), *given)  # type: ignore[no-untyped-call]
    return out, dict(zip(states, last, strict=True))


class _RecordedPass(NamedTuple):
    """A forward pass as autograd has recorded it; `edges`: None for a result without a gradient. It keeps no result."""

    edges: Sequence[GradientEdge | None]
    leaves: Sequence[Tensor]

    def gradients(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the leaves, None for a leaf that wants none."""
        pairs = [(edge, grad) for edge, grad in zip(self.edges, grads, strict=True) if edge is not None]
        wanted = [x for x in self.leaves if x.requires_grad]
        if not pairs:
            return [None] * len(self.leaves)
        edges, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(edges, wanted, given, retain_graph=True, allow_unused=True))
        return [next(found) if x.requires_grad else None for x in self.leaves]


class _Bordered(FirstOrder):
    """A call under autograd, which keeps its own record of it for the backward pass."""

    @staticmethod
    def forward(ctx: Any, run: Run, tokens: Tokens, names: Sequence[str], *given: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(need) for x, need in zip(given, ctx.needs_input_grad[3:], strict=True)]
            count = len(leaves) - len(names)
            out, last = run(tokens.having(leaves[:count]), dict(zip(names, leaves[count:], strict=True)))
        ends = [out, *last.values()]
        edges = [get_gradient_edge(x) if x.requires_grad else None for x in ends]
        ctx.recorded = _RecordedPass(edges, leaves)
        return tuple(x.detach() for x in ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *once(_gradients, ctx.recorded, *grads))


def _gradients(recorded: _RecordedPass, *grads: Tensor) -> tuple[Tensor | None, ...]:
    if all(map(_is_finite, grads)):
        return tuple(recorded.gradients(grads))
    finite = [grad.isfinite() for grad in grads]
    pairs = list(zip(finite, grads, strict=True))
    clean = recorded.gradients([torch.where(here, grad, 0) for here, grad in pairs])
    marks = recorded.gradients([torch.where(here, 0, _drawn(here).to(grad.dtype)) for here, grad in pairs])
    return tuple(x if x is None else _marked(x, mark) for x, mark in zip(clean, marks, strict=True))


def _marked(x: Tensor, mark: Tensor | None) -> Tensor:
    return x if mark is None else torch.where(mark != 0, math.nan, x)


def _is_finite(x: Tensor) -> bool:
    return is_finite(torch.view_as_real(x) if x.is_complex() else x)


def _drawn(like: Tensor) -> Tensor:
    """Numbers of which no sum of a few is 0."""
    return (torch.arange(like.numel(), device=like.device, dtype=torch.float64).cos() + 1.5).reshape(like.shape)


__all__ = ["with_borders"]
