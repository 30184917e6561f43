"""Linear recurrences with decays and corrections of rank one, computed chunk by chunk, differentiable once.

For each batch entry and head, with a state S (R, C):

    for each token t, for each of its micro-steps j:
        S ← D_j S                      the decay: along rows, along columns, along both, or one scalar
        S ← S + u_j (r_jᵀ S)           the correction; r_j reads S after the decay, or before it
        S ← S + k_j v_jᵀ
    o_t = q_tᵀ S

Linear attention, retention, Mamba-2, GLA, HGRN2, RWKV-6 and 7, DeltaNet and its gated variants, and Comba are special
cases. Within a chunk everything is matrix products; only passing the state from chunk to chunk is serial. All exponents
are ≤ 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnc.compiler.recurrences.recurrence_class import ONCE_A_TOKEN
from attnc.runtime.executors.recurrent.chunk_forms import Uncorrected, chunk_form
from attnc.runtime.executors.recurrent.chunk_layout import ChunkLayout, ChunkStretch
from attnc.runtime.executors.recurrent.chunk_states import advance, retreat
from attnc.runtime.executors.recurrent.decays import DocumentSegments
from attnc.runtime.executors.recurrent.linear_inputs import Inputs, checked
from attnc.runtime.executors.recurrent.recorded import is_keeping, recorded
from attnc.runtime.process.vector_math import settle

settle()


@dataclass(frozen=True)
class ChunkedRecurrence:
    """A call with its layout in chunks, computed in `dtype`; gates, β and resets are (B, H, N, ·), `resets` as int.

    `kept`: the list in which the forward pass keeps its chunk forms for the backward pass; None: recompute the forms.
    """

    layout: ChunkLayout
    dtype: torch.dtype
    kept: list[Uncorrected] | None = None

    keeps: ClassVar[int] = 1
    reuses: ClassVar[bool] = False

    def forward(self, tensors: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (out (B, H, T, C) in q's dtype, the final state (B, H, R, C), the states at chunk borders).

        The states before each chunk and after the last one are (B · H, chunks + 1, R, C).
        """
        inputs = Inputs(*tensors)
        shape = torch.Size((*inputs.q.shape[:3], inputs.v.shape[-1]))
        out: Tensor | None = None
        first = inputs.state.flatten(0, 1).to(self.dtype)
        states = first.new_empty(first.shape[0], self.layout.chunks + 1, *first.shape[1:])
        states[:, 0] = first
        for stretch in self._stretches():
            form = self._form(inputs, stretch)
            if self.kept is not None:
                self.kept.append(form)
            stretch_states = states[stretch.sequences]
            solved = advance(
                stretch_states[:, stretch.start : stretch.stop + 1], form.keep, form.writes(), form.corrector
            )
            result = form.outputs(stretch_states[:, stretch.start : stretch.stop].flatten(0, 1), solved)
            if self.layout.is_plain and result.shape[:2].numel() == shape[:3].numel():
                out = result.view(shape).to(inputs.q.dtype)
            else:
                out = inputs.q.new_empty(shape) if out is None else out
                stretch.put_tokens(result, out)
        assert out is not None
        return out, states[:, -1].reshape(inputs.state.shape).clone(), states

    def backward(
        self, tensors: Sequence[Any], kept: Sequence[Tensor], grads: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Compute the gradients of the inputs, in their dtypes."""
        inputs, (states,), (d_out, d_final) = Inputs(*tensors), kept, grads
        results = {
            name: torch.empty_like(x, memory_format=torch.contiguous_format)
            for name, x in inputs._asdict().items()
            if x is not None and x.is_floating_point()
        }
        adjoints = d_final.flatten(0, 1).clone()
        for stretch in reversed(self._stretches()):
            form = self.kept.pop() if self.kept else self._form(inputs, stretch)
            d_rows = stretch.token_rows(d_out).to(self.dtype)
            reads, corrector = form.reads(d_rows)
            sequences = stretch.sequences
            ends, adjoints[sequences], d_right = retreat(adjoints[sequences], form.keep, reads, corrector)
            gradients = form.adjoint(
                d_rows, states[sequences, stretch.start : stretch.stop].flatten(0, 1), ends, d_right
            )
            for name in gradients.keys() & results.keys():
                put = stretch.put_tokens if name in ONCE_A_TOKEN else stretch.put
                put(gradients[name], results[name])
        results["state"].copy_(adjoints.view_as(results["state"]))
        return [results.get(name) for name in Inputs._fields]

    def _stretches(self) -> list[ChunkStretch]:
        return self.layout.stretches(by_sequence=not self.layout.form.is_corrected)

    def _form(self, inputs: Inputs, stretch: ChunkStretch) -> Uncorrected:
        """Return the chunk form of a stretch; gates in fp64 keep their dtype."""
        rows = {"q": stretch.token_rows(inputs.q).to(self.dtype)}
        for name, x in inputs._asdict().items():
            if x is not None and name not in ("q", "state", "resets"):
                keeps = name in ("gate", "columns") and x.dtype == torch.float64
                rows[name] = stretch.rows(x) if keeps else stretch.rows(x).to(self.dtype)
        segments = None
        if inputs.resets is not None:
            segments = DocumentSegments(stretch.rows(inputs.resets)[..., 0].cumsum(-1), self.dtype)
        return chunk_form(self.layout.form, inputs._replace(**rows), segments)


def linear_recurrence(q: Tensor, k: Tensor, v: Tensor, *, chunk: int = 64, **options: Any) -> tuple[Tensor, Tensor]:
    """Compute (out (B, H, T, C) in q's dtype, the final state (B, H, R, C) in fp32, or in fp64 for fp64 inputs).

    Args:
        q: (B, H, T, R), any T ≥ 0.
        k: (B, H, N, R), N = T · micro; the micro-steps of a token are consecutive.
        v: (B, H, N, C).
        gate: log decay of each micro-step, ≤ 0 (-inf is legal): (H,) one per head, the same at every micro-step;
            (B, H, N) one for all rows; (B, H, N, R) one per row; None: no decay.
        gate_columns: log decay along the columns (B, H, N, C), with or without `gate`; not supported with a correction.
        correction: `Delta` or `RankOne`.
        before: o_t reads the state before the steps of token t, but after its reset.
        resets: bool (B, T): the state is set to zero before the token's read and steps.
        state: the state before the first token (B, H, R, C); None: zeros.
        micro: the number of micro-steps of a token; o_t reads the state after the last micro-step.
        chunk: the number of rows of a chunk, a power of two.

    16-bit inputs are computed in fp32. Both results are differentiable once in every real tensor. The memory of a call
    grows with T. The backward pass keeps the inputs and the states before chunks, and recomputes everything else.

    Raises:
        ArgumentError: for shapes that do not match, `gate_columns` with a correction, a chunk that is not a
            power of two or is shorter than a token's micro-steps.
        ArgumentTypeError: for a tensor of the wrong dtype.
        UnsupportedError: for second derivatives, forward-mode differentiation, and `vmap`.
    """
    form, inputs = checked(q, k, v, chunk=chunk, **options)
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    batch, heads, tokens, _ = q.shape
    if not batch * heads * tokens:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), inputs.state.to(dtype, copy=True)
    layout = ChunkLayout(batch, heads, tokens, form, min(chunk, 1 << (tokens * form.micro - 1).bit_length()))
    resets = None if inputs.resets is None else _reset_steps(inputs.resets, heads, form.micro)
    beta = None if inputs.beta is None else inputs.beta[..., None]
    inputs = inputs._replace(gate=_gates(inputs.gate, k, dtype), beta=beta, resets=resets)
    out, final = recorded(ChunkedRecurrence(layout, dtype, [] if is_keeping() else None), inputs)
    return out, final


def _gates(gate: Tensor | None, k: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return a gate of any shape as (B, H, N, R or 1); the gradient of a per-head gate is summed in `dtype`."""
    if gate is None or gate.ndim == 4:
        return gate
    if gate.ndim == 3:
        return gate[..., None]
    return gate.to(dtype)[None, :, None, None].expand(*k.shape[:3], 1)


def _reset_steps(resets: Tensor, heads: int, micro: int) -> Tensor:
    """Return resets (B, T) as int32 (B, H, N, 1), 1 at the first micro-step of a token with a reset."""
    steps = resets.new_zeros(*resets.shape, micro, dtype=torch.int32)
    steps[..., 0] = resets
    return steps.flatten(1)[:, None, :, None].expand(-1, heads, -1, 1)
