"""Attention under torch's autograd: first derivatives with respect to q, k and v, through output and LSE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.call_errors import UnsupportedError
from attnc.runtime.cpu import cpu_executor, hidden_values
from attnc.runtime.profiling import backward_row, keep_name
from attnc.runtime.transforms import without_autocast

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


class GradientWork(Protocol):
    """Attention and its gradient, neither of them recorded by autograd."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """(out, lse); `inputs` are the pattern's."""

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """(dq, dk, dv); `kept` are q, k, v, out, lse and the inputs."""


class Planned(NamedTuple):
    """The cpu executor under one plan; `need` says who sees the LSE."""

    plan: Plan
    scale: float
    need: cpu_executor.Need = "lse"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """`executor.forward`; the plan has what there is to know of the inputs."""
        out, lse = hidden_values.forward(self._run, q, k, v)
        return out, lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """`executor.backward`."""
        q, k, v, out, lse, *_ = kept
        found = hidden_values.backward(self._run, self._gradients, grad_out, grad_lse, (q, k, v), (out, lse))
        return cast("Triple", found)

    def _run(self, q: Tensor, k: Tensor, v: Tensor) -> Pair:
        return cpu_executor.forward(q, k, v, self.plan, self.scale, self.need)

    def _gradients(
        self, grad_out: Tensor, grad_lse: Tensor | None, vectors: hidden_values.Vectors, results: Sequence[Tensor]
    ) -> Triple:
        out, lse = results
        return cpu_executor.backward(grad_out, grad_lse, *vectors, out, lse, self.plan, self.scale)


class Guarded(NamedTuple):
    """Work on a CPU whose hidden keys reach no row, and whose rows reach no key that they do not see."""

    work: GradientWork

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """Run `work` so that no hidden key reaches a row; arguments as `GradientWork.forward`."""
        out, lse = hidden_values.forward(partial(self._run, inputs), q, k, v)
        return out, lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """Run the backward of `work`, with nothing crossing hidden pairs; arguments as `GradientWork.backward`."""
        q, k, v, out, lse, *inputs = kept
        run, gradients = partial(self._run, inputs), partial(self._gradients, inputs)
        found = hidden_values.backward(run, gradients, grad_out, grad_lse, (q, k, v), (out, lse))
        return cast("Triple", found)

    def _run(self, inputs: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Pair:
        return self.work.forward(q, k, v, inputs)

    def _gradients(
        self,
        inputs: Sequence[Tensor],
        grad_out: Tensor,
        grad_lse: Tensor | None,
        vectors: hidden_values.Vectors,
        results: Sequence[Tensor],
    ) -> Triple:
        return self.work.backward(grad_out, grad_lse, (*vectors, *results, *inputs))


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Pair:
    """(out, lse) of `executor.forward`, differentiable as `differentiable` says."""
    return differentiable(q, k, v, Planned(plan, scale), ())


def differentiable(q: Tensor, k: Tensor, v: Tensor, work: GradientWork, inputs: Sequence[Tensor]) -> Pair:
    """(out, lse) of `work.forward`, differentiable once in q, k and v through both.

    Kept for the backward: q, k, v, out, lse, the inputs, and `work`.

    Raises:
        UnsupportedError: on differentiating a gradient, forward-mode differentiation, or `vmap`.
    """
    if torch._C._are_functorch_transforms_active():
        return cast("Pair", _Transformed.apply(q, k, v, work, *inputs))  # type: ignore[no-untyped-call]
    return cast("Pair", _RecordedAttention.apply(q, k, v, work, *inputs))  # type: ignore[no-untyped-call]


def gradient(grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor], work: GradientWork) -> Triple:
    """(dq, dk, dv) of `work.backward`. Differentiating them is refused, by UnsupportedError when it is done."""
    return cast("Triple", once(_of_work, work, grad_out, grad_lse, *kept))


def _of_work(work: GradientWork, grad_out: Tensor, grad_lse: Tensor | None, *kept: Tensor) -> Triple:
    return work.backward(grad_out, grad_lse, kept)


def refuse_second() -> NoReturn:
    """Raise UnsupportedError where a gradient is differentiated."""
    raise UnsupportedError('second derivatives of attention: use the reference executor, backend="reference"')


def once(function: Callable[..., Any], *given: Any) -> Any:
    """`function` of what is given, a tensor or a tuple of them: what a backward pass computes.

    Differentiating it once more is refused, by UnsupportedError when it is done.
    """
    tensor = next((x for x in given if isinstance(x, Tensor)), None)
    with nullcontext() if tensor is None else without_autocast(tensor):
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return _OnceFunction.apply(function, *given)  # type: ignore[no-untyped-call]
        return function(*given)


class FirstOrder(torch.autograd.Function):
    """What cannot be transformed further."""

    @staticmethod
    def jvp(ctx: FunctionCtx, *tangents: Any) -> NoReturn:
        """Refused: forward-mode differentiation."""
        raise UnsupportedError(
            'forward-mode differentiation of attention: use the reference executor, backend="reference"'
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        """Refused."""
        raise UnsupportedError(
            'vmap over attention: fold the dimension into the batch, or use the reference executor, backend="reference"'
        )


class _OnceFunction(FirstOrder):
    """`once`, recorded."""

    @staticmethod
    def forward(function: Callable[..., Any], *given: Any) -> Any:
        return function(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        refuse_second()


class _AttentionFunction(FirstOrder):
    """What the two ways of recording `work.forward` have in common."""

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
    """For ordinary calls: with a separate `setup_context` torch takes several times as long for each."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: GradientWork, *inputs: Tensor) -> Pair:
        results = work.forward(q, k, v, inputs)
        _keep(ctx, work, (q, k, v, *results, *inputs))
        return results


class _Transformed(_AttentionFunction):
    """For calls under `torch.func`, which asks for a `setup_context`."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, work: GradientWork, *inputs: Tensor) -> Pair:
        return work.forward(q, k, v, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
        q, k, v, work, *rest = inputs
        _keep(ctx, work, (q, k, v, *output, *rest))
