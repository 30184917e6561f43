"""A linear recurrence under torch's autograd, computed in torch or by kernels; differentiable once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, cast

from torch import Tensor

from attnc.runtime.executors.cpu.autograd import FirstOrder, once
from attnc.runtime.executors.recurrent.chunk_forms import Gradients
from attnc.runtime.executors.recurrent.linear_inputs import Inputs
from attnc.runtime.process.profiling import backward_row, keep_name


class RecurrenceWork(Protocol):
    """The forward and backward pass of a recurrence, not recorded by autograd."""

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (out (B, H, T, C), the final state, states that the backward pass needs)."""

    def backward(self, inputs: Inputs, states: Tensor, d_out: Tensor, d_final: Tensor) -> Gradients:
        """Compute the gradients by input name."""


_KEEPING: ContextVar[bool] = ContextVar("whether the backward pass follows at once", default=False)


@contextmanager
def keeping() -> Iterator[None]:
    """Within this context, a forward pass keeps intermediates for the backward pass that follows at once."""
    token = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(token)


def is_keeping() -> bool:
    """Check whether forward passes keep intermediates for their backward pass."""
    return _KEEPING.get()


def recorded(work: RecurrenceWork, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Compute (out, the final state) under autograd."""
    out, final, _ = _Recurrence.apply(work, *inputs)  # type: ignore[no-untyped-call]
    return out, final


class _Recurrence(FirstOrder):
    """The recurrence under autograd; its third result holds the states that the backward pass needs."""

    @staticmethod
    def forward(work: RecurrenceWork, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        return work.forward(Inputs(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.work = inputs[0]
        keep_name(ctx)
        ctx.save_for_backward(output[2], *inputs[1:])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        with backward_row(ctx):
            return (None, *once(_gradients, ctx.work, d_out, d_final, *ctx.saved_tensors))


def _gradients(work: RecurrenceWork, d_out: Tensor, d_final: Tensor, *kept: Tensor | None) -> tuple[Tensor | None, ...]:
    states, *tensors = kept
    assert states is not None
    gradients = work.backward(Inputs(*cast("list[Any]", tensors)), states, d_out, d_final)
    return tuple(gradients.get(name) for name in Inputs._fields)


__all__ = ["is_keeping", "keeping", "recorded"]
