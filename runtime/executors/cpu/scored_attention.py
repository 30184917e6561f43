"""Attention whose scores are not `scale * dot(q, k)`, on a CPU, recorded for autograd.

`scored_forward` and `scored_backward` run the pieces of a plan tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from attnc.runtime.executors.cpu.autograd import FirstOrder, once
from attnc.runtime.executors.cpu.planned_call import PlannedCall
from attnc.runtime.executors.cpu.scored_backward import backward
from attnc.runtime.executors.cpu.scored_forward import RowResults, forward
from attnc.runtime.executors.cpu.tile_scores import Scores
from attnc.runtime.process.profiling import backward_row, keep_name


def _scores(call: PlannedCall, q: Tensor, k: Tensor, inputs: Sequence[Tensor]) -> Scores:
    return Scores(call.relations, call.operands(q.unbind(0), k.unbind(0), (), inputs))


class _ScoredFunction(FirstOrder):
    """The autograd function of `forward`. Saved: q, k, v, out, LSE, the shift if scores are `LARGE`, and the inputs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: PlannedCall, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        rows = forward(q, k, v, call.plan, _scores(call, q, k, [x.detach() for x in inputs]))
        relative_lse, shift, shifted = rows.lse, rows.shift, bool(rows.shift.any())
        out, lse = rows.out.to(q.dtype), relative_lse + shift if shifted else relative_lse
        ctx.call, ctx.shifted = call, shifted
        keep_name(ctx)
        ctx.save_for_backward(q, k, v, out, relative_lse, *([shift] if shifted else []), *inputs)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        kept = ctx.saved_tensors
        if not ctx.shifted:
            kept = *kept[:5], torch.zeros_like(kept[4]), *kept[5:]
        grad_out = torch.zeros_like(kept[3]) if grad_out is None else grad_out
        needs = ctx.needs_input_grad[4:]
        with backward_row(ctx):
            gradients = once(_gradients, ctx.call, needs, grad_out, grad_lse, *kept)
        return (*gradients[:3], None, *gradients[3:])


def _gradients(
    call: PlannedCall, needs: Sequence[bool], grad_out: Tensor, grad_lse: Tensor | None, *kept: Tensor
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of q, k, v, and of the floating-point inputs that need them."""
    q, k, v, out, lse, shift, *inputs = (x.detach() for x in kept)
    leaves = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]

    result = RowResults(out.to(lse.dtype), lse, shift)
    sums = backward(grad_out, grad_lse, (q, k, v), result, call.plan, _scores(call, q, k, leaves), wanted)
    rest = iter(sums.inputs)
    of_inputs = [next(rest).to(x.dtype) if need else None for x, need in zip(leaves, needs, strict=True)]
    return sums.q.to(q.dtype), sums.k.to(k.dtype), sums.v.to(v.dtype), *of_inputs


def attend(q: Tensor, k: Tensor, v: Tensor, call: PlannedCall, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) with custom scores or extra logits, differentiable once in q, k, v and `inputs`."""
    return cast("tuple[Tensor, Tensor]", _ScoredFunction.apply(q, k, v, call, *inputs))  # type: ignore[no-untyped-call]
