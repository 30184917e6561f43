"""The recurrence of a whole call, in stretches of chunks: forward, and backward from the states before chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnc.runtime.executors.recurrent.chunk_forms import (
    ChunkRows,
    DeltaRule,
    Gradients,
    RankOneCorrection,
    Uncorrected,
)
from attnc.runtime.executors.recurrent.chunk_layout import ChunkLayout, ChunkStretch
from attnc.runtime.executors.recurrent.chunk_states import advance, retreat
from attnc.runtime.executors.recurrent.decayed_columns import DecayedColumns
from attnc.runtime.executors.recurrent.decays import DocumentSegments
from attnc.runtime.process.vector_math import settle

settle()

ONCE_A_TOKEN = frozenset({"q", "bonus"})
"""Inputs with one row per token, not per micro-step."""


class Inputs(NamedTuple):
    """The tensors of a call: q and bonus (B, H, T, R), `state` (B, H, R, C), all others (B, H, N, F); `resets` int.

    F is 1 for `beta` and `resets`, and for a gate that all rows share.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    gate: Tensor | None
    columns: Tensor | None
    beta: Tensor | None
    read: Tensor | None
    left: Tensor | None
    bonus: Tensor | None
    resets: Tensor | None


@dataclass(frozen=True)
class ChunkedRecurrence:
    """A call's layout in chunks, and when it reads the state: `before`, `old` as in `ChunkRows`. Computed in `dtype`.

    `kept`: the list in which the forward pass keeps its chunk forms for the backward pass; None: recompute the forms.
    """

    layout: ChunkLayout
    before: bool
    old: bool
    dtype: torch.dtype
    kept: list[Uncorrected] | None = None

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (out (B, H, T, C) in q's dtype, the final state (B, H, R, C), the states at chunk borders).

        The states before each chunk and after the last one are (B · H, chunks + 1, R, C).
        """
        shape = torch.Size((*inputs.q.shape[:3], inputs.v.shape[-1]))
        out: Tensor | None = None
        first = inputs.state.flatten(0, 1).to(self.dtype)
        states = first.new_empty(first.shape[0], self.layout.chunks + 1, *first.shape[1:])
        states[:, 0] = first
        for stretch in self._stretches(inputs):
            form = _form(self._rows(inputs, stretch))
            if self.kept is not None:
                self.kept.append(form)
            rows, stretch_states = form.rows, states[stretch.sequences]
            solved = advance(
                stretch_states[:, stretch.start : stretch.stop + 1], form.keep, form.writes(), form.corrector
            )
            result = form.outputs(stretch_states[:, stretch.start : stretch.stop].flatten(0, 1), solved)
            if inputs.bonus is not None:
                bonus = self._token_rows(inputs.bonus, stretch)
                result.addcmul_((rows.q * bonus * rows.k).sum(-1, keepdim=True), rows.v)
            if self.layout.is_plain and result.shape[:2].numel() == shape[:3].numel():
                out = result.view(shape).to(inputs.q.dtype)
            else:
                out = inputs.q.new_empty(shape) if out is None else out
                stretch.put_tokens(result, out)
        assert out is not None
        return out, states[:, -1].reshape(inputs.state.shape).clone(), states

    def backward(self, inputs: Inputs, states: Tensor, d_out: Tensor, d_final: Tensor) -> Gradients:
        """Compute the gradients by input name, in the inputs' dtypes."""
        results = {
            name: torch.empty_like(x, memory_format=torch.contiguous_format)
            for name, x in inputs._asdict().items()
            if x is not None and x.is_floating_point()
        }
        adjoints = d_final.flatten(0, 1).clone()
        for stretch in reversed(self._stretches(inputs)):
            form = self.kept.pop() if self.kept else _form(self._rows(inputs, stretch))
            rows = form.rows
            d_rows = self._token_rows(d_out, stretch)
            reads, corrector = form.reads(d_rows)
            sequences = stretch.sequences
            ends, adjoints[sequences], d_right = retreat(adjoints[sequences], form.keep, reads, corrector)
            gradients = form.adjoint(
                d_rows, states[sequences, stretch.start : stretch.stop].flatten(0, 1), ends, d_right
            )
            if inputs.bonus is not None:
                _add_bonus_adjoint(gradients, rows, self._token_rows(inputs.bonus, stretch), d_rows)
            for name in gradients.keys() & results.keys():
                put = stretch.put_tokens if name in ONCE_A_TOKEN else stretch.put
                put(gradients[name], results[name])
        results["state"].copy_(adjoints.view_as(results["state"]))
        return results

    def _stretches(self, inputs: Inputs) -> list[ChunkStretch]:
        corrected = inputs.beta is not None or inputs.left is not None
        return self.layout.stretches(by_sequence=not corrected)

    def _rows(self, inputs: Inputs, stretch: ChunkStretch) -> ChunkRows:
        def in_rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else stretch.rows(x).to(self.dtype)

        def decays(x: Tensor | None) -> Tensor | None:
            return stretch.rows(x) if x is not None and x.dtype == torch.float64 else in_rows(x)

        k, v = stretch.rows(inputs.k).to(self.dtype), stretch.rows(inputs.v).to(self.dtype)
        gate, columns = decays(inputs.gate), decays(inputs.columns)
        segments = None
        if inputs.resets is not None:
            segments = DocumentSegments(stretch.rows(inputs.resets)[..., 0].cumsum(-1), self.dtype)
        return ChunkRows(
            q=self._token_rows(inputs.q, stretch),
            k=k,
            v=v,
            gate=gate,
            columns=columns,
            beta=in_rows(inputs.beta),
            read=in_rows(inputs.read),
            left=in_rows(inputs.left),
            segments=segments,
            before=self.before,
            old=self.old,
        )

    def _token_rows(self, x: Tensor, stretch: ChunkStretch) -> Tensor:
        return stretch.token_rows(x).to(self.dtype)


def _form(rows: ChunkRows) -> Uncorrected:
    """Return the chunk form that computes these rows."""
    if rows.columns is not None:
        return DecayedColumns(rows)
    if rows.left is not None:
        return RankOneCorrection(rows)
    return Uncorrected(rows) if rows.beta is None else DeltaRule(rows)


def _add_bonus_adjoint(gradients: Gradients, rows: ChunkRows, bonus: Tensor, d_out: Tensor) -> None:
    """Add the adjoints of the bonus term o += (q ⊙ bonus · k) v, which has no decay."""
    d_weight = (d_out * rows.v).sum(-1, keepdim=True)
    gradients["bonus"] = d_weight * rows.q * rows.k
    gradients["q"].addcmul_(d_weight * bonus, rows.k)
    gradients["k"].addcmul_(d_weight * bonus, rows.q)
    gradients["v"].addcmul_((rows.q * bonus * rows.k).sum(-1, keepdim=True), d_out)
