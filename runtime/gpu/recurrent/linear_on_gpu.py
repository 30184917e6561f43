"""`linear_recurrence` by kernels: the same call, the same results; see `attnc.runtime.recurrent.linear`."""

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
from attnc.runtime.call_errors import UnsupportedError
from attnc.runtime.gpu.recurrent.backward import backward
from attnc.runtime.gpu.recurrent.forward_passes import forward, stepped, walked
from attnc.runtime.gpu.recurrent.recurrence_tensors import call_of, problem_of
from attnc.runtime.gpu.recurrent.split import check_segments, is_filled, split
from attnc.runtime.recurrent.chunk_forms import Gradients
from attnc.runtime.recurrent.chunked import Inputs
from attnc.runtime.recurrent.linear import Delta, RankOne, check_options, check_shapes
from attnc.runtime.recurrent.recorded import recorded

LONGEST = 64
"""Rows of a chunk at most."""

FEW = LEAST
"""Steps that are done one after another where nothing is differentiated: a chunk has no fewer rows."""


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
    """As `attnc.runtime.recurrent.linear.linear_recurrence`, by Triton's kernels.

    For tensors on a GPU, or on the CPU in Triton's interpreter. Products are of 16-bit numbers where all of q, k, v and
    the correction's are of one 16-bit dtype, else of fp32 in three products of TF32 each; sums and states are fp32.
    Up to `FEW` steps without a gradient, as in generation, are one kernel that goes from token to token. More of them
    without a gradient store no states between chunks, in 16 bits, where no columns decay
    (`RecurrenceProblem.can_walk`).

    Args:
        segments: into how many the sequence is split, so that states go from chunk to chunk in all of them at once, at
            most; None: where batch and heads are too few for the device, as many as `fitting_segments` says. Results
            are the same but for rounding. With a correction a head whose steps let states grow is not split.

    Raises:
        ArgumentError, ArgumentTypeError: as the other does; on segments below 1.
        UnsupportedError: as the other does; on fp64, on more than 64 micro-steps, on a device without kernels.
    """
    check_segments(segments)
    check_options(gate_columns, correction, before, bonus, micro, chunk)
    check_shapes(q, k, v, micro, gate, gate_columns, correction, bonus, resets, state)
    if micro > LONGEST:
        raise UnsupportedError(f"kernels: micro is {micro}, they take up to {LONGEST}; on the CPU any number runs")
    rows = [q, k, v, *_rows_of(correction), *([] if bonus is None else [bonus])]
    if any(x.dtype == torch.float64 for x in rows):
        raise UnsupportedError("kernels: float64; convert to float32, or compute on the CPU")
    if state is None:
        state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=torch.float32, device=q.device)
    if not q[..., 0].numel():
        return q.new_zeros(*q.shape[:3], v.shape[-1]), state.to(torch.float32, copy=True)
    form = RecurrenceClass(
        gate=_gate_of(gate),
        columns=gate_columns is not None,
        correction=_correction_of(correction),
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
    """Results where no states are kept for a backward pass: few steps one after another, more in one walk.

    On a device that walks leave idle, states are stored, so that outputs are computed of all chunks at once.
    """
    call = call_of(problem, inputs)
    if inputs.k.shape[2] <= FEW:
        return stepped(call, inputs)
    stage = "fused" if problem.can_fuse else "walk"
    split(call, stage, segments)
    if is_filled(call, stage):
        return walked(call, inputs)
    out, states = forward(call, inputs)
    return out, _final(problem, inputs, states)


@dataclass(frozen=True)
class _ByKernels:
    """The work of a problem, as `recorded` has it."""

    problem: RecurrenceProblem
    segments: int | None

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        call = call_of(p, inputs)
        split(call, "states", self.segments)
        out, states = forward(call, inputs)
        return out.to(inputs.q.dtype), _final(p, inputs, states), states

    def backward(self, inputs: Inputs, states: Tensor, d_out: Tensor, d_final: Tensor) -> Gradients:
        call = call_of(self.problem, inputs)
        split(call, "adjoints", self.segments)
        return backward(call, inputs, states, d_out, d_final)


def _final(problem: RecurrenceProblem, inputs: Inputs, states: Tensor) -> Tensor:
    return states[:, -1, : problem.dk, : problem.dv].reshape(inputs.state.shape).clone()


def _is_recorded(inputs: Inputs) -> bool:
    if torch._C._are_functorch_transforms_active():
        return True
    given = [x for x in inputs if x is not None]
    if any(unpack_dual(x).tangent is not None for x in given):  # type: ignore[no-untyped-call]
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


def _rows_of(correction: Delta | RankOne | None) -> list[Tensor]:
    if isinstance(correction, Delta):
        return [] if correction.read is None else [correction.read]
    return [] if correction is None else [correction.left, correction.read]


_GATES: Mapping[int, Gate] = {1: "constant", 3: "scalar", 4: "rows"}
"""By the dimensions of a gate."""


def _gate_of(gate: Tensor | None) -> Gate:
    return "none" if gate is None else _GATES[gate.ndim]


def _correction_of(correction: Delta | RankOne | None) -> Correction:
    if isinstance(correction, Delta):
        return "delta" if correction.read is None else "comba"
    return "none" if correction is None else correction.sees
