"""Attention under torch's autograd: first derivatives with respect to q, k and v, through output and LSE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.transforms import without_autocast
from attnc.runtime.executors.cpu import cpu_executor, hidden_values
from attnc.runtime.process.profiling import backward_row, keep_name

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class GradientWork(Protocol):
    """An attention and its gradient, neither recorded by autograd."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """Compute (out, lse); `inputs` are the pattern's."""

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """Compute (dq, dk, dv); `kept`: q, k, v, out, lse and the inputs."""


class Planned(NamedTuple):
    """The cpu executor of one plan; `need` says who consumes the LSE."""

    plan: Plan
    scale: float
    need: cpu_executor.Need = "lse"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """Run `executor.forward`; the plan already holds what depends on the inputs."""
        out, lse = hidden_values.forward(self._run, q, k, v)
        return out, lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """Run `executor.backward`."""
        q, k, v, out, lse, *_ = kept
        gradients = hidden_values.backward(self._run, self._gradients, grad_out, grad_lse, (q, k, v), (out, lse))
        return cast("Triple", gradients)

    def _run(self, q: Tensor, k: Tensor, v: Tensor) -> Pair:
        return cpu_executor.forward(q, k, v, self.plan, self.scale, self.need)

    def _gradients(
        self, grad_out: Tensor, grad_lse: Tensor | None, vectors: hidden_values.Vectors, results: Sequence[Tensor]
    ) -> Triple:
        out, lse = results
        return cpu_executor.backward(grad_out, grad_lse, *vectors, out, lse, self.plan, self.scale)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Pair:
    """Compute (out, lse) of `executor.forward`, differentiable as `differentiable` says."""
    return differentiable(q, k, v, Planned(plan, scale), ())


def differentiable(q: Tensor, k: Tensor, v: Tensor, work: GradientWork, inputs: Sequence[Tensor]) -> Pair:
    """Compute (out, lse) of `work.forward`, differentiable once in q, k and v through both.

    Saved for the backward: q, k, v, out, lse, the inputs, and `work`.

    Raises:
        UnsupportedError: on differentiating a gradient, forward-mode differentiation, or `vmap`.
    """
    if torch._C._are_functorch_transforms_active():
        return cast("Pair", _Transformed.apply(q, k, v, work, *inputs))  # type: ignore[no-untyped-call]
    return cast("Pair", _RecordedAttention.apply(q, k, v, work, *inputs))  # type: ignore[no-untyped-call]


def gradient(grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor], work: GradientWork) -> Triple:
    """Compute (dq, dk, dv) of `work.backward`; differentiating them raises UnsupportedError."""
    return cast("Triple", once(_work_gradients, work, grad_out, grad_lse, *kept))


def _work_gradients(work: GradientWork, grad_out: Tensor, grad_lse: Tensor | None, *kept: Tensor) -> Triple:
    return work.backward(grad_out, grad_lse, kept)


def refuse_second() -> NoReturn:
    """Raise UnsupportedError because a gradient is differentiated."""
    raise UnsupportedError('second derivatives of attention: use the reference executor, backend="reference"')


def once(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function` for a backward pass; it returns a tensor or a tuple of tensors.

    Differentiating the result raises UnsupportedError.
    """
    tensor = next((x for x in arguments if isinstance(x, Tensor)), None)
    with nullcontext() if tensor is None else without_autocast(tensor):
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return _OnceFunction.apply(function, *arguments)  # type: ignore[no-untyped-call]
        return function(*arguments)


class FirstOrder(torch.autograd.Function):
    """An autograd function that cannot be transformed further."""

    @staticmethod
    def jvp(ctx: FunctionCtx, *tangents: Any) -> NoReturn:
        """Raise UnsupportedError: forward-mode differentiation is not supported."""
        raise UnsupportedError(
            'forward-mode differentiation of attention: use the reference executor, backend="reference"'
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        """Raise UnsupportedError: `vmap` is not supported."""
        raise UnsupportedError(
            'vmap over attention: fold the dimension into the batch, or use the reference executor, backend="reference"'
        )


class _OnceFunction(FirstOrder):
    """The autograd function of `once`."""

    @staticmethod
    def forward(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        refuse_second()


class _AttentionFunction(FirstOrder):
    """The common backward of both ways to record `work.forward`."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grads
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        kept = ctx.saved_tensors
        grad_out = torch.zeros_like(kept[3]) if grad_out is None else grad_out
        with backward_row(ctx):
            results = gradient(grad_out, grad_lse, kept, ctx.work)
        needed = [g if need else None for g, need in zip(results, ctx.needs_input_grad, strict=False)]
        return (*needed, *[None] * (len(ctx.needs_input_grad) - 3))


def _keep(ctx: Any, work: GradientWork, tensors: Sequence[Tensor]) -> None:
    ctx.work = work
    keep_name(ctx)
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


class _RecordedAttention(_AttentionFunction):
    """The autograd function of ordinary calls; a separate `setup_context` makes torch several times slower per call."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: GradientWork, *inputs: Tensor) -> Pair:
        results = work.forward(q, k, v, inputs)
        _keep(ctx, work, (q, k, v, *results, *inputs))
        return results


class _Transformed(_AttentionFunction):
    """The autograd function of calls under `torch.func`, which requires a `setup_context`."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, work: GradientWork, *inputs: Tensor) -> Pair:
        return work.forward(q, k, v, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
        q, k, v, work, *rest = inputs
        _keep(ctx, work, (q, k, v, *output, *rest))
