"""Coupled states, which read each other, computed stretch by stretch. Differentiable once.

The backward pass keeps the tensors and the states before stretches. It recomputes each stretch and differentiates it by
torch's autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from attnc.runtime.executors.cpu.autograd import FirstOrder, once
from attnc.runtime.executors.recurrent import chunk_layout
from attnc.runtime.executors.recurrent.coupled_chunks import (
    CoupledForm,
    Vectors,
    chunk_length,
    reach_of,
    stretch,
    weights_of,
)
from attnc.runtime.executors.recurrent.pair_weights import PairWeights
from attnc.runtime.process.profiling import backward_row, keep_name

Stretch = tuple[int, int, int]
"""The first token, the end token (exclusive), and the number of tokens of a chunk."""


def coupled_recurrence(
    form: CoupledForm, may: Tensor, state: Tensor, mixes: Tensor, vectors: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Compute (the results, (B, H, T, C) each; the states after the last token (B, H, m, R, C)).

    Args:
        form: the numbers of states m, impulses P and readers Q.
        may: 1 where `mixes` may be nonzero, else 0, (B or 1, H or 1, T, m + Q, m + P).
        state: the states before the first token (B, H, m, R, C).
        mixes: the weights of the states before a token and of its impulses in the states after the token and in its
            readers, (B, H, T, m + Q, m + P). A correction reads only impulses before its own.
        vectors: (B, H, T, ·): u of the impulses, v of the impulses, then the readers' vectors, results before
            corrections.

    Differentiable once in the state, the mixes and the vectors.

    Raises UnsupportedError for second derivatives, forward-mode differentiation, and `vmap`.
    """
    if not mixes.shape[2]:
        return [state.new_zeros(*mixes.shape[:3], state.shape[-1]) for _ in range(form.outs)], state
    *outs, final, _ = _Coupled.apply(_CoupledCall(form, may), state, mixes, *vectors)  # type: ignore[no-untyped-call]
    return cast("list[Tensor]", outs), cast("Tensor", final)


@dataclass
class _CoupledCall:
    """A call, and the stretches that its forward pass chooses."""

    form: CoupledForm
    may: Tensor
    stretches: list[Stretch] = field(default_factory=list)

    def forward(self, state: Tensor, *tensors: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Compute (results, the states after the last token, the states before stretches)."""
        mixes, start = tensors[0], 0
        kept, parts = list[Tensor](), list[list[Tensor]]()
        while start < mixes.shape[2]:
            current, weights = self._next(mixes, start)
            self.stretches.append(current)
            kept.append(state)
            tokens = slice(start, current[1])
            outs, state = self._compute(current, weights, state, [x[:, :, tokens] for x in tensors[1:]])
            parts.append(outs)
            start = current[1]
        return [torch.cat(tokens, 2) for tokens in zip(*parts, strict=True)], state, torch.stack(kept)

    def backward(
        self, kept: Tensor, tensors: Sequence[Tensor], d_outs: Sequence[Tensor], d_state: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Compute the gradients of the states before the first token, of the mixes and of the vectors."""
        totals = [torch.zeros_like(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        for current, before in reversed(list(zip(self.stretches, kept, strict=True))):
            tokens = slice(*current[:2])
            parts = [x[:, :, tokens].detach() for x in tensors]
            start = before.detach().requires_grad_()
            inputs = [start, *(x.requires_grad_() for x, need in zip(parts, needed, strict=True) if need)]
            with torch.enable_grad():
                weights, _ = weights_of(self.form, parts[0], current[2])
                outs, end = self._compute(current, weights, start, parts[1:])
            pairs = zip([*outs, end], [*(d[:, :, tokens] for d in d_outs), d_state], strict=True)
            roots = [(x, d) for x, d in pairs if x.requires_grad]
            d_state, *gradients = torch.autograd.grad(
                [x for x, _ in roots], inputs, [d for _, d in roots], allow_unused=True, materialize_grads=True
            )
            for total, part in zip([x for x in totals if x is not None], gradients, strict=True):
                total[:, :, tokens] = part
        return [d_state, *totals]

    def _compute(
        self, current: Stretch, weights: PairWeights, state: Tensor, vectors: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        start, end, length = current
        count = self.form.impulses
        reach = reach_of(self.form, self.may[:, :, start:end], length)
        stretch_vectors = Vectors(vectors[:count], vectors[count : 2 * count], vectors[2 * count :])
        return stretch(self.form, reach, weights, state, stretch_vectors)

    def _next(self, mixes: Tensor, start: int) -> tuple[Stretch, PairWeights]:
        """Return the next stretch and its weights; it covers fewer tokens where weights require shorter chunks."""
        full_length = chunk_length(mixes.shape[2])
        chunks = max(chunk_layout.STRETCH // (full_length * mixes.shape[0] * mixes.shape[1]), 1)
        end = min(start + chunks * full_length, mixes.shape[2])
        weights, length = weights_of(self.form, mixes[:, :, start:end])
        if length == chunk_length(end - start):
            return (start, end, length), weights
        end = min(start + chunks * length, end)
        length = min(length, chunk_length(end - start))
        return (start, end, length), weights_of(self.form, mixes[:, :, start:end], length)[0]


class _Coupled(FirstOrder):
    """The recurrence under autograd; its last result holds the states that the backward pass needs."""

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
        arguments = (ctx.call, ctx.needs_input_grad[2:], len(grads) - 2, *grads[:-1], *ctx.saved_tensors)
        with backward_row(ctx):
            return (None, *once(_gradients, *arguments))


def _gradients(
    call: _CoupledCall, needed: Sequence[bool], outs: int, *grads_and_saved: Tensor
) -> tuple[Tensor | None, ...]:
    d_outs, (d_final, kept, *tensors) = grads_and_saved[:outs], grads_and_saved[outs:]
    return tuple(call.backward(kept, tensors, d_outs, d_final, needed))


__all__ = ["coupled_recurrence"]
