"""The recurrence of a whole call, in stretches of chunks: forward, and backward from the states before chunks."""

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
from attnc.runtime.executors.recurrent.linear_inputs import Inputs
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
