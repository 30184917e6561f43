"""The recurrence of a whole call, stretch of chunks by stretch: forward, and backward from the states before chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnc.runtime.recurrent.chunk_forms import ChunkRows, DeltaRule, Gradients, RankOneCorrection, Uncorrected
from attnc.runtime.recurrent.chunk_layout import ChunkLayout, ChunkStretch
from attnc.runtime.recurrent.chunk_states import advance, retreat
from attnc.runtime.recurrent.decayed_columns import DecayedColumns
from attnc.runtime.recurrent.decays import DocumentSegments
from attnc.runtime.vector_math import settle

settle()

ONCE_A_TOKEN = frozenset({"q", "bonus"})


class Inputs(NamedTuple):
    """The tensors of a call, (B, H, N, F) each, q and bonus (B, H, T, R); `state` (B, H, R, C), `resets` int.

    β and resets have F = 1, and so has a gate that all rows share.
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
    """Where the tokens stand, and when the state is read: `before`, `old` as in `ChunkRows`. Computed in `dtype`.

    `kept`: the forms of the forward pass for the backward pass; None: they are made again.
    """

    layout: ChunkLayout
    before: bool
    old: bool
    dtype: torch.dtype
    kept: list[Uncorrected] | None = None

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """(out (B, H, T, C) in q's dtype, the final state, those before each chunk and after the last).

        The last are (B · H, chunks + 1, R, C).
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
            rows, own = form.rows, states[stretch.sequences]
            solved = advance(own[:, stretch.start : stretch.stop + 1], form.keep, form.writes(), form.corrector)
            result = form.outputs(own[:, stretch.start : stretch.stop].flatten(0, 1), solved)
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
        """The gradients by name, in their inputs' dtypes."""
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
            own = stretch.sequences
            ends, adjoints[own], d_right = retreat(adjoints[own], form.keep, reads, corrector)
            gradients = form.adjoint(d_rows, states[own, stretch.start : stretch.stop].flatten(0, 1), ends, d_right)
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
        def laid(x: Tensor | None) -> Tensor | None:
            return None if x is None else stretch.rows(x).to(self.dtype)

        def decays(x: Tensor | None) -> Tensor | None:
            return stretch.rows(x) if x is not None and x.dtype == torch.float64 else laid(x)

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
            beta=laid(inputs.beta),
            read=laid(inputs.read),
            left=laid(inputs.left),
            segments=segments,
            before=self.before,
            old=self.old,
        )

    def _token_rows(self, x: Tensor, stretch: ChunkStretch) -> Tensor:
        return stretch.token_rows(x).to(self.dtype)


def _form(rows: ChunkRows) -> Uncorrected:
    """The form that computes these rows."""
    if rows.columns is not None:
        return DecayedColumns(rows)
    if rows.left is not None:
        return RankOneCorrection(rows)
    return Uncorrected(rows) if rows.beta is None else DeltaRule(rows)


def _add_bonus_adjoint(gradients: Gradients, rows: ChunkRows, bonus: Tensor, d_out: Tensor) -> None:
    """Add the adjoints of o += (q ⊙ bonus · k) v, a term without decay."""
    d_weight = (d_out * rows.v).sum(-1, keepdim=True)
    gradients["bonus"] = d_weight * rows.q * rows.k
    gradients["q"].addcmul_(d_weight * bonus, rows.k)
    gradients["k"].addcmul_(d_weight * bonus, rows.q)
    gradients["v"].addcmul_((rows.q * bonus * rows.k).sum(-1, keepdim=True), d_out)
