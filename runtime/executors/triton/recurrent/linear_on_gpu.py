"""`linear_recurrence` by kernels, with the interface and the results of `attnc.runtime.executors.recurrent.linear`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from attnc.compiler.ir import Recur
from attnc.compiler.recurrences.derived import Coupled
from attnc.compiler.recurrences.kernels.recurrence_problem import LEAST, RecurrenceProblem
from attnc.compiler.recurrences.recurrence_class import RecurrenceClass
from attnc.compiler.recurrences.recurrence_form import RecurrenceForm
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.recurrent import linear as in_torch
from attnc.runtime.executors.recurrent.linear_inputs import Inputs, checked
from attnc.runtime.executors.recurrent.passes import Linear
from attnc.runtime.executors.recurrent.recorded import recorded
from attnc.runtime.executors.triton.recurrent.backward import backward
from attnc.runtime.executors.triton.recurrent.forward_passes import forward, step_tokens, walk_chunks
from attnc.runtime.executors.triton.recurrent.recurrence_tensors import call_of, problem_of
from attnc.runtime.executors.triton.recurrent.split import check_segments, is_filled, split

LONGEST = 64
"""Maximum number of rows in a chunk."""

_ROWS = ("q", "k", "v", "read", "left")
"""The inputs that are operands of products."""

FEW = LEAST
"""Maximum number of steps that run one after another without gradients; a chunk has at least as many rows."""


def without_kernels(derived: RecurrenceForm, recur: Recur, dtype: torch.dtype) -> str:
    """Return why a recurrence runs as operations of torch in calls of a dtype; empty if all its states have kernels."""
    if dtype == torch.float64:
        return "float64 has no kernels"
    if any(isinstance(stage, Coupled) for stage in derived.stages):
        return f"the coupled states of `{recur.name}` have no kernels"
    return ""


def linear_of(dtype: torch.dtype) -> Linear:
    """Return the function for linear passes in a dtype; it casts rows to the dtype, as tile products require."""
    return in_torch.linear_recurrence if dtype == torch.float64 else partial(_linear_in, dtype)


def _linear_in(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, *, chunk: int = LONGEST, **options: Any
) -> tuple[Tensor, Tensor]:
    """Run a linear pass by kernels whose operands have a dtype.

    `chunk`: the chunk length chosen for a CPU; kernels use it only where the steps of a token need more than their own.
    """
    form, inputs = checked(q, k, v, chunk=max(chunk, LONGEST), **options)
    rows = {name: x.to(dtype) for name in _ROWS if (x := getattr(inputs, name)) is not None}
    out, final = _run(form, inputs._replace(**rows), max(chunk, LONGEST), None)
    return out.to(q.dtype), final


def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, *, segments: int | None = None, chunk: int = 64, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute `attnc.runtime.executors.recurrent.linear.linear_recurrence` by Triton kernels.

    The tensors are on a GPU, or on the CPU in Triton's interpreter. Products take 16-bit numbers if q, k, v and the
    correction all have one 16-bit dtype, else fp32 in three TF32 products each; sums and states are fp32. Without
    gradients, up to `FEW` steps, as in generation, run in one kernel that goes from token to token. More steps without
    gradients store no states between chunks, in 16 bits, if no columns decay (`RecurrenceProblem.can_walk`).

    Args:
        segments: the maximum number of segments of the sequence, through which states pass at the same time; None:
            as many as `fitting_segments` returns where batch and heads are too few for the device. Results are the
            same but for rounding. With a correction, a head whose steps let states grow is not split.

    Raises:
        ArgumentError, ArgumentTypeError: as `linear.linear_recurrence`; ArgumentError if segments is below 1.
        UnsupportedError: as `linear.linear_recurrence`; for fp64, more than 64 micro-steps, a device without kernels.
    """
    check_segments(segments)
    return _run(*checked(q, k, v, chunk=chunk, **options), chunk, segments)


def _run(form: RecurrenceClass, inputs: Inputs, chunk: int, segments: int | None) -> tuple[Tensor, Tensor]:
    if form.micro > LONGEST:
        raise UnsupportedError(
            f"kernels support micro up to {LONGEST}, got {form.micro}; the CPU executor has no limit"
        )
    dtypes = {x.dtype for name in _ROWS if (x := getattr(inputs, name)) is not None}
    if torch.float64 in dtypes:
        raise UnsupportedError("kernels do not support float64; convert to float32, or compute on the CPU")
    q, v = inputs.q, inputs.v
    if not q[..., 0].numel():
        return q.new_zeros(*q.shape[:3], v.shape[-1]), inputs.state.to(torch.float32, copy=True)
    problem = problem_of(form, q, v, dtypes.pop() if len(dtypes) == 1 else torch.float32, chunk)
    if not _is_recorded(inputs) and (inputs.k.shape[2] <= FEW or problem.can_walk):
        out, final = _not_recorded(problem, segments, inputs)
        return out.to(q.dtype), final
    out, final = recorded(_ByKernels(problem, segments), inputs)
    return out, final


def _not_recorded(problem: RecurrenceProblem, segments: int | None, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Compute results without storing states for a backward pass: few steps one after another, more in one walk.

    If a walk would leave the device idle, states are stored, so that the outputs of all chunks are computed at once.
    """
    call = call_of(problem, inputs)
    if inputs.k.shape[2] <= FEW:
        return step_tokens(call, inputs)
    stage = "fused" if problem.can_fuse else "walk"
    split(call, stage, segments)
    if is_filled(call, stage):
        return walk_chunks(call, inputs)
    out, states = forward(call, inputs)
    return out, _final_state(problem, inputs, states)


@dataclass(frozen=True)
class _ByKernels:
    """The forward and backward pass of a problem, for `recorded`."""

    problem: RecurrenceProblem
    segments: int | None

    keeps: ClassVar[int] = 1
    reuses: ClassVar[bool] = False

    def forward(self, tensors: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        p, inputs = self.problem, Inputs(*tensors)
        call = call_of(p, inputs)
        split(call, "states", self.segments)
        out, states = forward(call, inputs)
        return out.to(inputs.q.dtype), _final_state(p, inputs, states), states

    def backward(
        self, tensors: Sequence[Any], kept: Sequence[Tensor], grads: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        inputs = Inputs(*tensors)
        call = call_of(self.problem, inputs)
        split(call, "adjoints", self.segments)
        gradients = backward(call, inputs, *kept, *grads)
        return [gradients.get(name) for name in Inputs._fields]


def _final_state(problem: RecurrenceProblem, inputs: Inputs, states: Tensor) -> Tensor:
    """Return the final state (B, H, R, C), without padding, from the states at chunk borders."""
    return states[:, -1, : problem.dk, : problem.dv].reshape(inputs.state.shape).clone()


def _is_recorded(inputs: Inputs) -> bool:
    """Check whether a call needs autograd: for gradients, or to raise the errors of functorch and forward mode."""
    if torch._C._are_functorch_transforms_active():
        return True
    tensors = [x for x in inputs if x is not None]
    if any(unpack_dual(x).tangent is not None for x in tensors):  # type: ignore[no-untyped-call]
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
