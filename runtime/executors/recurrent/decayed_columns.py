"""Decay along the state's columns, with or without decay along its rows: the values are scaled inside each level.

o_t = Σ_{j ≤ t} A_tj exp(Σ_{(j, t]} columns) ⊙ v_j, where A is the rows' pair matrix. A pair's weight differs between
columns, so no single matrix gives the outputs. Within a level one matrix does, because the exponent is split between
the values and the outputs. Corrections are not supported: they would need a triangular solve for each column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.runtime.executors.recurrent.chunk_forms import ChunkRows, Gradients, Uncorrected
from attnc.runtime.executors.recurrent.chunk_states import Corrector
from attnc.runtime.executors.recurrent.decays import EdgeAdjoints, row_products
from attnc.runtime.executors.recurrent.levels import (
    DecayLevel,
    SumAdjoints,
    advanced,
    below,
    block_sums,
    even,
    gate_gradient,
    odd,
    weighted,
)


class DecayedColumns(Uncorrected):
    """S′ = D S D′ + k vᵀ with D′ along columns (the first pass of Zhang et al. 2024, "Gated Slot Attention")."""

    def __init__(self, rows: ChunkRows) -> None:
        super().__init__(rows)
        assert rows.columns is not None
        self.columns = block_sums(rows.columns, rows.v.dtype)
        self.into = self.columns.enter(rows.before)
        self.values = rows.v * self.columns.out_of

    @property
    def keep(self) -> Tensor:
        """The factor by which a chunk decays the state, (n, R or 1, C)."""
        return self.decay.total.mT * self.columns.total

    def writes(self) -> Tensor:
        """Return the part of the state that a chunk writes, (n, R, C)."""
        return self.leaving[0].mT @ self.values

    def outputs(self, states: Tensor, solved: Tensor | None) -> Tensor:
        """Compute o (n, L, C) from the states before the chunks (n, R, C)."""
        out = (self.entering[0] @ states).mul_(self.into)
        for level in self.columns.levels:
            products = weighted(below(self._weights, level.block), even(self.rows.v, level.block) * level.fall)
            odd(out, level.block).addcmul_(products, level.rises(self.rows.before))
        return out if self.rows.before else out.addcmul_(self._own_weight, self.rows.v)

    def reads(self, d_out: Tensor) -> tuple[Tensor, Corrector | None]:
        """Return the outputs' adjoint of the state before each chunk, (n, R, C), and no corrector."""
        return self.entering[0].mT @ (d_out * self.into), None

    def adjoint(self, d_out: Tensor, states: Tensor, ends: Tensor, d_right: Tensor | None) -> Gradients:
        """Compute the gradients of `Uncorrected.adjoint`, and the gradient of the columns' log decays."""
        d_read, d_values = d_out * self.into, self.leaving[0] @ ends
        d_weights, d_v = torch.zeros_like(self._weights), d_values * self.columns.out_of
        levels = [self._at_level(level, d_out, d_weights, d_v) for level in self.columns.levels]
        if not self.rows.before:
            d_weights.diagonal(dim1=1, dim2=2).copy_(row_products(d_out, self.rows.v))
            d_v.addcmul_(self._own_weight, d_out)
        d_keep = states * ends
        d_into = (self.entering[0] @ states).mul_(d_read)
        d_total = (d_keep * self.keep).sum(-2)[:, None]
        d_columns = SumAdjoints(levels, self._inclusive(d_into), self.values * d_values, d_total)
        (d_q,), (d_k,), d_gate = self.decay.adjoint(
            [[d_weights]],
            self.pairs,
            (self.readers, self.writers),
            (self.entering, self.leaving),
            EdgeAdjoints([d_read @ states.mT], [self.values @ ends.mT], (d_keep * self.columns.total).sum(-1)[:, None]),
        )
        gradients = {"q": d_q, "k": d_k, "v": d_v, "columns": gate_gradient(d_columns)}
        return gradients if d_gate is None else {**gradients, "gate": d_gate}

    @property
    def _weights(self) -> Tensor:
        return self.pairs[0][0]

    @property
    def _own_weight(self) -> Tensor:
        """The weight of each token's own write, (n, L, 1)."""
        return self._weights.diagonal(dim1=1, dim2=2)[..., None]

    def _at_level(self, level: DecayLevel, d_out: Tensor, d_weights: Tensor, d_v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the adjoints of one level's exponents; add those of weights and values to `d_weights` and `d_v`."""
        weights, values = below(self._weights, level.block), even(self.rows.v, level.block) * level.fall
        read = odd(d_out, level.block) * level.rises(self.rows.before)
        below(d_weights, level.block).copy_(read @ values.mT)
        d_values = weighted(weights.mT, read)
        even(d_v, level.block).addcmul_(d_values, level.fall)
        return self._inclusive(weighted(weights, values).mul_(read)), values.mul_(d_values)

    def _inclusive(self, term: Tensor) -> Tensor:
        """Move an exclusive reader's adjoint to the token before, the last whose decay it sees."""
        return advanced(term) if self.rows.before else term
