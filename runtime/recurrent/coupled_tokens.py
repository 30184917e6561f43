"""States that read each other: what their tokens are made of, as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.ir import Value
from attnc.compiler.recurrences.coupled_states import may_be
from attnc.compiler.recurrences.derived import Coupled, Mix
from attnc.compiler.value_nodes import rank
from attnc.runtime.recurrent.coupled_chunks import CoupledForm
from attnc.runtime.recurrent.coupled_stretches import coupled_recurrence
from attnc.runtime.recurrent.token_values import TokenValues


def run(
    stage: Coupled, values: TokenValues, states: Sequence[Tensor], fresh: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each read of every token, in processing order, and the states after the last token.

    `fresh`: the tokens before which the states are emptied, bool (B, H or 1, T).
    """
    narrow = states[0].ndim == 3
    start = torch.stack([x[..., None] if narrow else x for x in states], 2)
    rows, columns = start.shape[3:]
    corrections = [(i, read, mix) for i, own in enumerate(stage.impulses) for read, mix in own.reads]
    form = CoupledForm(len(states), len(stage.impulses), len(stage.reads), tuple(i for i, _, _ in corrections))
    mixes = [*stage.after, *(one.of for one in stage.reads), *(mix for _, _, mix in corrections)]
    gathered = _Gathered(values, form, start, fresh)
    vectors = [gathered.vector(own.left, rows) for own in stage.impulses]
    vectors += [gathered.vector(own.value, columns) for own in stage.impulses]
    vectors += [gathered.vector(one.query, rows) for one in stage.reads]
    vectors += [gathered.vector(read, rows) for _, read, _ in corrections]
    outs, final = coupled_recurrence(form, gathered.may(mixes), start, gathered.mixes(mixes), vectors)
    return [x[..., 0] if narrow else x for x in outs], [x[..., 0] if narrow else x for x in final.unbind(2)]


@dataclass(frozen=True)
class _Gathered:
    """Values of all tokens as tensors in the dtype of the states."""

    values: TokenValues
    form: CoupledForm
    like: Tensor
    fresh: Tensor | None

    def vector(self, node: Value | None, width: int) -> Tensor:
        """(B, H, T, width)."""
        shape = (*self.values.tokens.counts, width)
        if node is None:
            return self.like.new_zeros(()).expand(shape)
        span = self.values.whole(node).to(self.like.dtype)
        return (span if rank(node) else span[..., None]).expand(shape)

    def mixes(self, mixes: Sequence[Mix]) -> Tensor:
        """(B, H, T, mixes, m + P)."""
        none = self.like.new_zeros((1, 1, 1))
        parts = [none if node is None else self.values.whole(node).to(self.like.dtype) for node in self._nodes(mixes)]
        whole = torch.stack([x.expand(self.values.tokens.counts) for x in parts], 3)
        return self._emptied(whole.reshape(*whole.shape[:3], len(mixes), self.form.states + self.form.impulses))

    def may(self, mixes: Sequence[Mix]) -> Tensor:
        """1 where a factor may be other than 0; of a batch entry and head where that is the same for all."""
        known: dict[Value, Value] = {}
        parts = [self.values.whole(may_be(node, known)) for node in self._nodes(mixes)]
        lead = np.broadcast_shapes(*(x.shape for x in parts), (1, 1, self.values.tokens.counts[2]))
        whole = torch.stack([x.expand(lead) for x in parts], 3)
        return self._emptied(whole.reshape(*lead, len(mixes), self.form.states + self.form.impulses))

    def _nodes(self, mixes: Sequence[Mix]) -> Iterator[Value | None]:
        for mix in mixes:
            yield from mix.states
            yield from (mix.impulses + (None,) * self.form.impulses)[: self.form.impulses]

    def _emptied(self, mixes: Tensor) -> Tensor:
        """Nothing is taken of states that are emptied."""
        if self.fresh is None:
            return mixes
        of_states = torch.arange(mixes.shape[-1], device=mixes.device) < self.form.states
        return torch.where(self.fresh[..., None, None] & of_states, 0, mixes)


__all__ = ["run"]
