"""`linear_recurrence` by kernels, with the interface and the results of `attnc.runtime.executors.recurrent.linear`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from attnc.compiler.recurrences.kernels.recurrence_problem import (
    LEAST,
    Correction,
    Gate,
    RecurrenceClass,
    RecurrenceProblem,
)
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.recurrent.chunk_forms import Gradients
from attnc.runtime.executors.recurrent.chunked import Inputs
from attnc.runtime.executors.recurrent.linear import (
    Delta,
    RankOne,
    check_options,
    check_shapes,
)
from attnc.runtime.executors.recurrent.recorded import recorded
from attnc.runtime.executors.triton.recurrent.backward import backward
from attnc.runtime.executors.triton.recurrent.forward_passes import forward, step_tokens, walk_chunks
from attnc.runtime.executors.triton.recurrent.recurrence_tensors import call_of, problem_of
from attnc.runtime.executors.triton.recurrent.split import check_segments, is_filled, split

LONGEST = 64
"""Maximum number of rows in a chunk."""

FEW = LEAST
"""Maximum number of steps that run one after another without gradients; a chunk has at least as many rows."""


def linear_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None = None,
    gate_columns: Tensor | None = None,
    correction: Delta | RankOne | None = None,
    before: bool = False,
    bonus: Tensor | None = None,
    resets: Tensor | None = None,
    state: Tensor | None = None,
    micro: int = 1,
    chunk: int = 64,
    segments: int | None = None,
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
    check_options(gate_columns, correction, before, bonus, micro, chunk)
    check_shapes(q, k, v, micro, gate, gate_columns, correction, bonus, resets, state)
    if micro > LONGEST:
        raise UnsupportedError(f"kernels support micro up to {LONGEST}, got {micro}; the CPU executor has no limit")
    rows = [q, k, v, *_correction_rows(correction), *([] if bonus is None else [bonus])]
    if any(x.dtype == torch.float64 for x in rows):
        raise UnsupportedError("kernels do not support float64; convert to float32, or compute on the CPU")
    if state is None:
        state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=torch.float32, device=q.device)
    if not q[..., 0].numel():
        return q.new_zeros(*q.shape[:3], v.shape[-1]), state.to(torch.float32, copy=True)
    form = RecurrenceClass(
        gate=_gate_kind(gate),
        columns=gate_columns is not None,
        correction=_correction_kind(correction),
        before=before,
        bonus=bonus is not None,
        resets=resets is not None,
        micro=micro,
    )
    dtypes = {x.dtype for x in rows}
    problem = problem_of(form, q, v, dtypes.pop() if len(dtypes) == 1 else torch.float32, chunk)
    inputs = Inputs(
        q,
        k,
        v,
        state,
        gate=gate,
        columns=gate_columns,
        beta=correction.beta if isinstance(correction, Delta) else None,
        read=correction.read if correction else None,
        left=correction.left if isinstance(correction, RankOne) else None,
        bonus=bonus,
        resets=resets,
    )
    if not _is_recorded(inputs) and (k.shape[2] <= FEW or problem.can_walk):
        out, final = _not_recorded(problem, segments, inputs)
        return out.to(q.dtype), final
    return recorded(_ByKernels(problem, segments), inputs)


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

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        call = call_of(p, inputs)
        split(call, "states", self.segments)
        out, states = forward(call, inputs)
        return out.to(inputs.q.dtype), _final_state(p, inputs, states), states

    def backward(self, inputs: Inputs, states: Tensor, d_out: Tensor, d_final: Tensor) -> Gradients:
        call = call_of(self.problem, inputs)
        split(call, "adjoints", self.segments)
        return backward(call, inputs, states, d_out, d_final)


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


def _correction_rows(correction: Delta | RankOne | None) -> list[Tensor]:
    """Return the tensors of a correction that are operands of products."""
    if isinstance(correction, Delta):
        return [] if correction.read is None else [correction.read]
    return [] if correction is None else [correction.left, correction.read]


_GATES: Mapping[int, Gate] = {1: "constant", 3: "scalar", 4: "rows"}
"""The kind of a gate by its number of dimensions."""


def _gate_kind(gate: Tensor | None) -> Gate:
    return "none" if gate is None else _GATES[gate.ndim]


def _correction_kind(correction: Delta | RankOne | None) -> Correction:
    if isinstance(correction, Delta):
        return "delta" if correction.read is None else "comba"
    return "none" if correction is None else correction.sees
