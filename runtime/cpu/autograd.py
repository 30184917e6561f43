"""The cpu executor under torch's autograd: first derivatives with respect to q, k and v, through output and LSE."""

from __future__ import annotations

from inspect import signature
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from attnc.compiler.planning.plan import Plan
from attnc.runtime.cpu import executor
from attnc.runtime.errors import UnsupportedError


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of `executor.forward`, differentiable once in q, k and v through both.

    Raises:
        UnsupportedError: on differentiating a gradient, forward-mode differentiation, or `vmap`.
    """
    results = TiledAttention.apply(q, k, v, plan, scale)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor]", results)


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    return executor.forward(q, k, v, plan, scale)


# torch asks for the signature at every call, which takes as long as the kernel does on a few tokens unless it is here.
_forward.__signature__ = signature(_forward)  # type: ignore[attr-defined]


class TiledAttention(torch.autograd.Function):
    """`executor.forward` and `executor.backward`. It keeps q, k, v, out and LSE, and nothing else."""

    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward reads."""
        *tensors, ctx.plan, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients for q, k and v from those of out and lse, either of which may be missing."""
        grad_out, grad_lse = grads
        if grad_out is None and grad_lse is None:
            return (None,) * 5
        q, k, v, out, lse = saved = ctx.saved_tensors
        given = torch.zeros_like(out) if grad_out is None else grad_out
        results = executor.backward(given, grad_lse, q, k, v, out, lse, ctx.plan, ctx.scale)
        if torch.is_grad_enabled():
            sources = [t for t in (*saved, grad_out, grad_lse) if t is not None and t.requires_grad]
            results = _Final.apply(*results, *sources) if sources else results  # type: ignore[no-untyped-call]
        needed = [g if need else None for g, need in zip(results, ctx.needs_input_grad[:3], strict=True)]
        return (*needed, None, None)

    @staticmethod
    def jvp(ctx: FunctionCtx, *tangents: Any) -> NoReturn:
        """Refused."""
        raise UnsupportedError("forward-mode differentiation of attention: use the reference executor")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        """Refused."""
        raise UnsupportedError("vmap over attention: use the reference executor, or fold the dimension into the batch")


class _Final(torch.autograd.Function):
    """Its first three inputs, which depend on the rest in a way that is not differentiable yet."""

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise UnsupportedError("second derivatives of attention: use the reference executor")
