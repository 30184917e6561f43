"""Coupled states: gather the mixes and vectors of their tokens as tensors, and run the recurrence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.ir import Value
from attnc.compiler.recurrences.coupled_states import may_be
from attnc.compiler.recurrences.derived import Coupled, Mix
from attnc.runtime.executors.recurrent import chunk_layout
from attnc.runtime.executors.recurrent.coupled_chunks import (
    CoupledForm,
    PairWeights,
    Vectors,
    chunk_length,
    reach_of,
    stretch,
    weights_of,
)
from attnc.runtime.executors.recurrent.recorded import SpanWork, Tensors, recorded
from attnc.runtime.executors.recurrent.token_values import TokenValues


def run(
    stage: Coupled, values: TokenValues, states: Sequence[Tensor], fresh: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each read of every token, in processing order, and the states after the last token.

    `fresh`: the tokens before which the states are set to zero, bool (B, H or 1, T).
    """
    narrow = states[0].ndim == 3
    start = torch.stack([x[..., None] if narrow else x for x in states], 2)
    rows, columns = start.shape[3:]
    corrections = [(i, read, mix) for i, impulse in enumerate(stage.impulses) for read, mix in impulse.reads]
    form = CoupledForm(len(states), len(stage.impulses), len(stage.reads), tuple(i for i, _, _ in corrections))
    mixes = [*stage.after, *(read.of for read in stage.reads), *(mix for _, _, mix in corrections)]
    gathered = _Gathered(values, form, start, fresh)
    vectors = [gathered.vector(impulse.left, rows) for impulse in stage.impulses]
    vectors += [gathered.vector(impulse.value, columns) for impulse in stage.impulses]
    vectors += [gathered.vector(read.query, rows) for read in stage.reads]
    vectors += [gathered.vector(read, rows) for _, read, _ in corrections]
    tokens = values.tokens.counts[2]
    if tokens:
        tensors = [gathered.mixes(mixes), *vectors, start]
        *outs, final = recorded(_CoupledWork(form, gathered.may(mixes), tokens), tensors)
    else:
        outs, final = [x.new_zeros(*x.shape[:3], columns) for x in vectors[: form.outs]], start
    return [x[..., 0] if narrow else x for x in outs], [x[..., 0] if narrow else x for x in final.unbind(2)]


class _CoupledWork(SpanWork):
    """The tokens of coupled states, in spans of chunks; the arguments are mixes and vectors, then the states.

    `may`: 1 where mixes may be nonzero, else 0, (B or 1, H or 1, T, m + Q, m + P). A span ends early where weights
    require shorter chunks.
    """

    def __init__(self, form: CoupledForm, may: Tensor, tokens: int) -> None:
        super().__init__(1, tokens)
        self._form, self._may = form, may
        self._lengths: dict[int, int] = {}
        self._weights: PairWeights | None = None

    def spans(self, arguments: Tensors) -> Iterator[slice]:
        """Yield the spans, whose chunks are as long as their weights allow."""
        mixes, start = arguments[0], 0
        full_length = chunk_length(self._tokens)
        count = max(chunk_layout.STRETCH // (full_length * mixes.shape[0] * mixes.shape[1]), 1) * full_length
        while start < self._tokens:
            end = min(start + count, self._tokens)
            self._weights, length = weights_of(self._form, mixes[:, :, start:end])
            if length != chunk_length(end - start):
                end = min(start + count // full_length * length, end)
                length = min(length, chunk_length(end - start))
                self._weights, _ = weights_of(self._form, mixes[:, :, start:end], length)
            self._lengths[start] = length
            yield slice(start, end)
            start = end

    def cut(self, arguments: Tensors, span: slice) -> list[Tensor]:
        """Return the mixes and vectors of a span."""
        return [x[:, :, span] for x in arguments]

    def run(self, parts: list[Tensor], states: Tensors, span: slice, known: Tensors | None) -> tuple[Tensors, Tensors]:
        """Compute (the results, (B, H, T, C) each; the states after the span)."""
        (mixes, *vectors), count, length = parts, self._form.impulses, self._lengths[span.start]
        if known is not None or self._weights is None:
            self._weights, _ = weights_of(self._form, mixes, length)
        reach = reach_of(self._form, self._may[:, :, span], length)
        stretch_vectors = Vectors(vectors[:count], vectors[count : 2 * count], vectors[2 * count :])
        outs, last = stretch(self._form, reach, self._weights, states[0], stretch_vectors)
        return outs, [last]


@dataclass(frozen=True)
class _Gathered:
    """Values of all tokens as tensors in the dtype of the states."""

    values: TokenValues
    form: CoupledForm
    like: Tensor
    fresh: Tensor | None

    def vector(self, node: Value | None, width: int) -> Tensor:
        """Return a vector for every token, (B, H, T, width)."""
        return self.values.vectors(node, width, self.like.dtype)

    def mixes(self, mixes: Sequence[Mix]) -> Tensor:
        """Return mixes for every token, (B, H, T, mixes, m + P)."""
        zero = self.like.new_zeros((1, 1, 1))
        parts = [zero if node is None else self.values.whole(node).to(self.like.dtype) for node in self._nodes(mixes)]
        stacked = torch.stack([x.expand(self.values.tokens.counts) for x in parts], 3)
        return self._emptied(stacked.reshape(*stacked.shape[:3], len(mixes), self.form.states + self.form.impulses))

    def may(self, mixes: Sequence[Mix]) -> Tensor:
        """Return 1 where a factor may be nonzero, else 0, (B or 1, H or 1, T, mixes, m + P)."""
        cache: dict[Value, Value] = {}
        parts = [self.values.whole(may_be(node, cache)) for node in self._nodes(mixes)]
        lead = np.broadcast_shapes(*(x.shape for x in parts), (1, 1, self.values.tokens.counts[2]))
        stacked = torch.stack([x.expand(lead) for x in parts], 3)
        return self._emptied(stacked.reshape(*lead, len(mixes), self.form.states + self.form.impulses))

    def _nodes(self, mixes: Sequence[Mix]) -> Iterator[Value | None]:
        """Yield the factors of each mix: of all states, then of all impulses; None for zero."""
        for mix in mixes:
            yield from mix.states
            yield from (mix.impulses + (None,) * self.form.impulses)[: self.form.impulses]

    def _emptied(self, mixes: Tensor) -> Tensor:
        """Return the mixes with the weights of states set to 0 where `fresh` resets the states."""
        if self.fresh is None:
            return mixes
        is_state = torch.arange(mixes.shape[-1], device=mixes.device) < self.form.states
        return torch.where(self.fresh[..., None, None] & is_state, 0, mixes)
