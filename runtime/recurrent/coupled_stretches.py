"""States that read each other, stretch by stretch. Differentiable once.

Kept for the backward are the tensors and the states before stretches; a stretch is computed anew, and differentiated by
torch's own autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from attnc.runtime.cpu.autograd import FirstOrder, once
from attnc.runtime.profiling import backward_row, keep_name
from attnc.runtime.recurrent import chunk_layout
from attnc.runtime.recurrent.coupled_chunks import CoupledForm, Vectors, chunk_length, reach_of, stretch, weights_of
from attnc.runtime.recurrent.pair_weights import PairWeights

Stretch = tuple[int, int, int]
"""The first token, the end, and the length of chunks."""


def coupled_recurrence(
    form: CoupledForm, may: Tensor, state: Tensor, mixes: Tensor, vectors: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """(results (B, H, T, C) each, the states after the last token (B, H, m, R, C)).

    Args:
        form: m states, P impulses, Q readers.
        may: mixes that are 1 where those of the call may be other than 0, (B or 1, H or 1, T, m + Q, m + P).
        state: the states before the first token (B, H, m, R, C).
        mixes: what states after tokens and readers are made of: of states before the token, and of its impulses,
            (B, H, T, m + Q, m + P). A correction reads impulses before its own alone.
        vectors: (B, H, T, ·): u and v of the impulses, then vectors of the readers, those of results first.

    Differentiable once in the state, the mixes and the vectors.

    Raises UnsupportedError on differentiating a gradient, forward-mode differentiation, or `vmap`.
    """
    if not mixes.shape[2]:
        return [state.new_zeros(*mixes.shape[:3], state.shape[-1]) for _ in range(form.outs)], state
    *outs, final, _ = _Coupled.apply(_CoupledCall(form, may), state, mixes, *vectors)  # type: ignore[no-untyped-call]
    return cast("list[Tensor]", outs), cast("Tensor", final)


@dataclass
class _CoupledCall:
    """A call, and the stretches that its forward finds."""

    form: CoupledForm
    may: Tensor
    stretches: list[Stretch] = field(default_factory=list)

    def forward(self, state: Tensor, *tensors: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """(results, the states after the last token, the states before stretches)."""
        mixes, at = tensors[0], 0
        kept, parts = list[Tensor](), list[list[Tensor]]()
        while at < mixes.shape[2]:
            here, weights = self._next(mixes, at)
            self.stretches.append(here)
            kept.append(state)
            own = slice(at, here[1])
            outs, state = self._compute(here, weights, state, [x[:, :, own] for x in tensors[1:]])
            parts.append(outs)
            at = here[1]
        return [torch.cat(own, 2) for own in zip(*parts, strict=True)], state, torch.stack(kept)

    def backward(
        self, kept: Tensor, tensors: Sequence[Tensor], d_outs: Sequence[Tensor], d_state: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the states before the first token, of mixes and of vectors."""
        totals = [torch.zeros_like(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        for here, before in reversed(list(zip(self.stretches, kept, strict=True))):
            own = slice(*here[:2])
            parts = [x[:, :, own].detach() for x in tensors]
            start = before.detach().requires_grad_()
            wanted = [start, *(x.requires_grad_() for x, need in zip(parts, needed, strict=True) if need)]
            with torch.enable_grad():
                weights, _ = weights_of(self.form, parts[0], here[2])
                outs, end = self._compute(here, weights, start, parts[1:])
            pairs = zip([*outs, end], [*(d[:, :, own] for d in d_outs), d_state], strict=True)
            roots = [(x, d) for x, d in pairs if x.requires_grad]
            d_state, *found = torch.autograd.grad(
                [x for x, _ in roots], wanted, [d for _, d in roots], allow_unused=True, materialize_grads=True
            )
            for total, part in zip([x for x in totals if x is not None], found, strict=True):
                total[:, :, own] = part
        return [d_state, *totals]

    def _compute(
        self, here: Stretch, weights: PairWeights, state: Tensor, vectors: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        at, end, length = here
        count = self.form.impulses
        reach = reach_of(self.form, self.may[:, :, at:end], length)
        given = Vectors(vectors[:count], vectors[count : 2 * count], vectors[2 * count :])
        return stretch(self.form, reach, weights, state, given)

    def _next(self, mixes: Tensor, at: int) -> tuple[Stretch, PairWeights]:
        """As many chunks as are computed at once: of fewer tokens where they are shorter."""
        whole = chunk_length(mixes.shape[2])
        chunks = max(chunk_layout.STRETCH // (whole * mixes.shape[0] * mixes.shape[1]), 1)
        end = min(at + chunks * whole, mixes.shape[2])
        weights, length = weights_of(self.form, mixes[:, :, at:end])
        if length == chunk_length(end - at):
            return (at, end, length), weights
        end = min(at + chunks * length, end)
        length = min(length, chunk_length(end - at))
        return (at, end, length), weights_of(self.form, mixes[:, :, at:end], length)[0]


class _Coupled(FirstOrder):
    """The recurrence under autograd; its last result is what the backward pass needs."""

    @staticmethod
    def forward(call: _CoupledCall, *tensors: Tensor) -> tuple[Tensor, ...]:
        outs, final, kept = call.forward(*tensors)
        return (*outs, final, kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]
        keep_name(ctx)
        ctx.save_for_backward(output[-1], *inputs[2:])
        ctx.mark_non_differentiable(output[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = (ctx.call, ctx.needs_input_grad[2:], len(grads) - 2, *grads[:-1], *ctx.saved_tensors)
        with backward_row(ctx):
            return (None, *once(_gradients, *given))


def _gradients(call: _CoupledCall, needed: Sequence[bool], outs: int, *rest: Tensor) -> tuple[Tensor | None, ...]:
    d_outs, (d_final, kept, *tensors) = rest[:outs], rest[outs:]
    return tuple(call.backward(kept, tensors, d_outs, d_final, needed))


__all__ = ["coupled_recurrence"]
