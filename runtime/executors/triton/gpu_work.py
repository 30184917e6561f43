"""Attention by kernels, and its gradient, in the form that autograd needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.tensor_checks import call_shape, check_tensors
from attnc.runtime.executors.cpu import row_attention
from attnc.runtime.executors.cpu.autograd import Pair, Triple
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.executors.cpu.planned_call import PlannedCall
from attnc.runtime.executors.triton.gpu_executor import ScaledKernels
from attnc.runtime.executors.triton.planner import gpu_planner
from attnc.runtime.fallbacks import IN_TORCH, note
from attnc.runtime.planning.plans import Planner, relations_of


class OnGpu(NamedTuple):
    """The triton executor of one pattern; without kernels, tiles run in torch on the device."""

    planner: Planner
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """Run `ScaledKernels.forward`."""
        try:
            prepared = gpu_planner(self.planner).prepared(q, k, v, inputs)
        except NotInKernelsError as error:
            call = in_tiles(self.planner, q, k, v, inputs, self.scale, error)
            note_tiles(self.planner, error)
            out, lse = row_attention.forward(q, k, v, call, self._real(inputs))
            return out.to(q.dtype), lse
        return ScaledKernels(prepared, self.scale).forward(q, k, v)

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """Run `ScaledKernels.backward`."""
        q, k, v, _, _, *inputs = kept
        try:
            prepared = gpu_planner(self.planner).prepared(q, k, v, inputs)
        except NotInKernelsError as error:
            call = in_tiles(self.planner, q, k, v, inputs, self.scale, error)
            sums, _ = row_attention.backward(grad_out, grad_lse, (q, k, v), call, self._real(inputs))
            return sums["q"].to(q.dtype), sums["k"].to(k.dtype), sums["v"].to(v.dtype)
        return ScaledKernels(prepared, self.scale).backward(grad_out, grad_lse, kept)[0]

    def _real(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the floating-point inputs, which tiles in torch expect even if no score reads them."""
        named_inputs = zip(self.planner.pattern.tensors, inputs, strict=True)
        return [x for tensor, x in named_inputs if tensor.is_floating]


def in_tiles(
    planner: Planner,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: Sequence[Tensor],
    scale: float,
    reason: NotInKernelsError,
) -> PlannedCall:
    """Return a call that runs as tiles in torch. Raises UnsupportedError under `strict`."""
    if planner.strict:
        raise UnsupportedError(without_kernels(planner.pattern.name, reason)) from reason
    pattern = planner.pattern
    plan = cpu_plans(planner).plan_of(q, k, v, inputs)
    named_inputs = {tensor.name: x for tensor, x in zip(pattern.tensors, inputs, strict=True)}
    return PlannedCall(plan, relations_of(pattern, call_shape(pattern, check_tensors(q, k, v), named_inputs)), scale)


def note_tiles(planner: Planner, reason: NotInKernelsError) -> None:
    """Count a call that runs as tiles in torch."""
    note(planner.pattern.name, IN_TORCH, f"there are no kernels for {reason}")


def without_kernels(name: str, reason: NotInKernelsError) -> str:
    """Return the error message of `strict` for a pattern without kernels."""
    return (
        f"strict: `{name}` has no kernels for {reason} and would run as tiles in torch; compile it "
        f"without strict to allow that"
    )
