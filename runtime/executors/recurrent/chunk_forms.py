"""The chunk forms: without a correction, with the delta rule, with any correction of rank one, with column decay.

For a chunk that starts with the state S, with pair matrices A (`decays`), readers q and r, and writers k and u:

    o = (q ⊙ into) S + A_q values          S′ = total ⊙ S + (writers ⊙ out of)ᵀ values

The forms differ in their values: v, the solution of a triangular system, or both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler.recurrences.recurrence_class import RecurrenceClass
from attnc.runtime.executors.recurrent.chunk_states import Corrector
from attnc.runtime.executors.recurrent.decays import (
    ChunkDecay,
    DocumentSegments,
    EdgeAdjoints,
    NoDecay,
    Pairs,
    RowDecay,
    ScalarDecay,
    row_products,
    set_nearest,
)
from attnc.runtime.executors.recurrent.levels import (
    DecayLevel,
    SumAdjoints,
    advanced,
    below,
    block_sums,
    even,
    gate_gradient,
    odd,
    siblings,
    weighted,
)
from attnc.runtime.executors.recurrent.linear_inputs import Inputs

BASE = 16


def inverse(lower: Tensor) -> Tensor:
    """Compute (I + lower)⁻¹ of strictly lower triangles (n, L, L), L a power of two; reads only the strict triangle.

    Blocks of 16 rows are inverted by substitution, then pairs of blocks are merged: [[X, 0], [-Y A X, Y]]. The product
    (I + A)(I + A²)(I + A⁴)… is equal in exact arithmetic, but its intermediates grow like 3^16 where keys resemble one
    another, and fp32 then loses every digit of the result. (The UT transform of Joffrain et al. 2006, as used by Yang
    et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 3.2.)
    """
    n, length, _ = lower.shape
    block = min(BASE, length)
    unit = torch.eye(block, dtype=lower.dtype, device=lower.device)
    result = torch.zeros_like(lower, memory_format=torch.contiguous_format)
    _diagonal(result, block).copy_(
        torch.linalg.solve_triangular(
            _diagonal(lower, block), unit.expand(n, length // block, block, block), upper=False, unitriangular=True
        )
    )
    while block < length:
        first, second = siblings(result, block, 0, 0), siblings(result, block, 1, 1)
        below(result, block).copy_((second @ below(lower, block) @ first).neg_())
        block *= 2
    return result


def _diagonal(matrices: Tensor, block: int) -> Tensor:
    """View the blocks on the diagonal of (n, L, L) as (n, L / block, block, block)."""
    n, length, _ = matrices.shape
    chunk, down, right = matrices.stride()
    return matrices.as_strided(
        (n, length // block, block, block), (chunk, block * (down + right), down, right), matrices.storage_offset()
    )


Gradients = dict[str, Tensor]


class Uncorrected:
    """S′ = D S + k vᵀ: the values are v (Yang et al. 2024, "Gated Linear Attention", section 4; Dao and Gu 2024).

    `rows`: the tensors of a stretch of n chunks of L rows, (n, L, ·).
    """

    def __init__(self, form: RecurrenceClass, rows: Inputs, segments: DocumentSegments | None) -> None:
        self.form, self.rows = form, rows
        self.readers: list[Tensor] = [getattr(rows, name) for name in form.readers]
        self.writers: list[Tensor] = [getattr(rows, name) for name in form.writers]
        self.decay = self._decay(segments)
        self.pairs = self.decay.pairs(self.readers, self.writers)
        self.entering, self.leaving = self.decay.enter(self.readers), self.decay.leave(self.writers)
        self.corrector = self._corrector()

    def _decay(self, segments: DocumentSegments | None) -> ChunkDecay:
        rows, exclusive = self.rows, self.form.exclusive
        if rows.gate is None and segments is None:
            return NoDecay(rows.k, exclusive)
        gate = rows.k.new_zeros(*rows.k.shape[:2], 1) if rows.gate is None else rows.gate
        kind = ScalarDecay if gate.shape[-1] == 1 else RowDecay
        return kind(gate, rows.k.dtype, segments, exclusive)

    @property
    def keep(self) -> Tensor:
        """The factor by which a chunk decays the state, (n, R or 1, 1)."""
        return self.decay.total.mT

    def writes(self) -> Tensor | None:
        """Return the part of the state that a chunk writes independently of the state before, (n, R, C)."""
        return self.leaving[0].mT @ self.rows.v

    def outputs(self, states: Tensor, solved: Tensor | None) -> Tensor:
        """Compute o (n, L, C) from the states before the chunks (n, R, C) and the corrector's solution."""
        out = self.entering[0] @ states
        for pairs, values in zip(self.pairs[0], self._values(solved), strict=True):
            out.baddbmm_(pairs, values)
        return out

    def reads(self, d_out: Tensor) -> tuple[Tensor, Corrector | None]:
        """Return the outputs' adjoint of the state before each chunk, (n, R, C), and the corrector for the adjoint."""
        corrector = self.corrector
        if corrector:
            corrector = corrector._replace(right=self.pairs[0][-1].mT @ d_out)
        return self.entering[0].mT @ d_out, corrector

    def adjoint(self, d_out: Tensor, states: Tensor, ends: Tensor, d_right: Tensor | None) -> Gradients:
        """Compute the gradients by input name, except the state's.

        `ends` (n, R, C): adjoints of the states after the chunks. `d_right`: adjoints of the corrector's right sides.
        """
        values, d_read, gradients = self._value_adjoint(d_out, states, ends, d_right)
        d_products = [d_out] if d_read is None else [d_out, d_read]
        d_pairs: Pairs = [[d @ value.mT for value in values] for d in d_products]
        if not self.form.before:
            for d_own, value in zip(d_pairs[0], values, strict=True):
                d_own.diagonal(dim1=1, dim2=2).copy_(row_products(d_out, value))
        first: list[Tensor] = []
        if isinstance(self.decay, ScalarDecay):
            set_nearest(d_pairs, d_products, values, self.decay.exclusive)
            wide_states = states.double()
            first = [row_products(wide_states, d[:, :1].double())[:, None] for d in d_products]
        d_edges = EdgeAdjoints(
            [d @ states.mT for d in d_products],
            [value @ ends.mT for value in values],
            (states * ends).sum(-1)[:, None],
            first,
        )
        d_readers, d_writers, d_gate = self.decay.adjoint(
            d_pairs,
            self.pairs,
            (self.readers, self.writers),
            (self.entering, self.leaving),
            d_edges,
        )
        gradients |= {} if d_gate is None else {"gate": d_gate}
        names = (*self.form.writers, *self.form.readers)
        for name, d in zip(names, (*d_writers, *d_readers), strict=True):
            gradients[name] = gradients[name] + d if name in gradients else d
        return gradients

    def _corrector(self) -> Corrector | None:
        return None

    def _values(self, solved: Tensor | None) -> list[Tensor]:
        """Return the values, one tensor per writer."""
        return [self.rows.v]

    def _value_adjoint(
        self, d_out: Tensor, states: Tensor, ends: Tensor, d_right: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None, Gradients]:
        """Return (values, adjoint of the correction's products with values and state (n, L, C), gradients so far)."""
        return [self.rows.v], None, {"v": self._direct_adjoint(d_out, ends)}

    def _direct_adjoint(self, d_out: Tensor, ends: Tensor) -> Tensor:
        """Return the adjoint of v from the outputs and from the state after the chunk."""
        return (self.leaving[0] @ ends).baddbmm_(self.pairs[0][0].mT, d_out)


class DeltaRule(Uncorrected):
    """S′ = (I - β k rᵀ) D S + β k vᵀ: write and correction share one system, (I + β A_r) values = β (v - r S).

    Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 3.2; with
    gates Yang, Kautz and Hatamizadeh 2025, "Gated Delta Networks", section 3.3.
    """

    def _corrector(self) -> Corrector:
        assert self.rows.beta is not None
        self.beta = self.rows.beta
        solver = inverse(self.beta * self.pairs[1][0])
        return Corrector(solver, self.beta * self.rows.v, -self.beta * self.entering[1], self.leaving[0])

    def writes(self) -> None:
        """Return None: every write passes through the corrector."""

    def _values(self, solved: Tensor | None) -> list[Tensor]:
        assert solved is not None
        return [solved]

    def _value_adjoint(
        self, d_out: Tensor, states: Tensor, ends: Tensor, d_right: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None, Gradients]:
        assert self.corrector
        assert d_right is not None
        missing = torch.baddbmm(self.rows.v, self.entering[1], states, alpha=-1)
        values = self.corrector.inverse @ (self.beta * missing)
        d_v = self.beta * d_right
        # Computed from what β multiplies instead of values / β, which may be 0 / 0.
        d_beta = (d_right * torch.baddbmm(missing, self.pairs[1][0], values, alpha=-1)).sum(-1, keepdim=True)
        return [values], -d_v, {"v": d_v, "beta": d_beta}


class RankOneCorrection(Uncorrected):
    """S′ = D S + u (rᵀ D S) + k vᵀ, or with rᵀ S: solves for the corrections' reads, p = (I - A_ru)⁻¹ (r S + A_rk v).

    The values are v and p (the generalised delta rule of RWKV-7, Peng et al. 2025, section 4, with S transposed).
    """

    def _corrector(self) -> Corrector:
        right = self.pairs[1][0] @ self.rows.v
        return Corrector(inverse(-self.pairs[1][1]), right, self.entering[1], self.leaving[1])

    def _values(self, solved: Tensor | None) -> list[Tensor]:
        assert solved is not None
        return [self.rows.v, solved]

    def _value_adjoint(
        self, d_out: Tensor, states: Tensor, ends: Tensor, d_right: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None, Gradients]:
        assert self.corrector
        assert d_right is not None
        d_v = self._direct_adjoint(d_out, ends).baddbmm_(self.pairs[1][0].mT, d_right)
        return self._values(self.corrector.solve(states)), d_right, {"v": d_v}


class DecayedColumns(Uncorrected):
    """S′ = D S D′ + k vᵀ with D′ along columns (the first pass of Zhang et al. 2024, "Gated Slot Attention").

    o_t = Σ_{j ≤ t} A_tj exp(Σ_{(j, t]} columns) ⊙ v_j, where A is the rows' pair matrix. A pair's weight differs
    between columns, so no single matrix gives the outputs. Within a level one matrix does, because the exponent is
    split between the values and the outputs. Corrections would need a triangular solve for each column.
    """

    def __init__(self, form: RecurrenceClass, rows: Inputs, segments: DocumentSegments | None) -> None:
        super().__init__(form, rows, segments)
        assert rows.columns is not None
        self.columns = block_sums(rows.columns, rows.v.dtype)
        self.into = self.columns.enter(form.before)
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
            odd(out, level.block).addcmul_(products, level.rises(self.form.before))
        return out if self.form.before else out.addcmul_(self._own_weight, self.rows.v)

    def reads(self, d_out: Tensor) -> tuple[Tensor, Corrector | None]:
        """Return the outputs' adjoint of the state before each chunk, (n, R, C), and no corrector."""
        return self.entering[0].mT @ (d_out * self.into), None

    def adjoint(self, d_out: Tensor, states: Tensor, ends: Tensor, d_right: Tensor | None) -> Gradients:
        """Compute the gradients of `Uncorrected.adjoint`, and the gradient of the columns' log decays."""
        d_read, d_values = d_out * self.into, self.leaving[0] @ ends
        d_weights, d_v = torch.zeros_like(self._weights), d_values * self.columns.out_of
        levels = [self._at_level(level, d_out, d_weights, d_v) for level in self.columns.levels]
        if not self.form.before:
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
        read = odd(d_out, level.block) * level.rises(self.form.before)
        below(d_weights, level.block).copy_(read @ values.mT)
        d_values = weighted(weights.mT, read)
        even(d_v, level.block).addcmul_(d_values, level.fall)
        return self._inclusive(weighted(weights, values).mul_(read)), values.mul_(d_values)

    def _inclusive(self, term: Tensor) -> Tensor:
        """Move an exclusive reader's adjoint to the token before, the last whose decay it sees."""
        return advanced(term) if self.form.before else term


def chunk_form(form: RecurrenceClass, rows: Inputs, segments: DocumentSegments | None) -> Uncorrected:
    """Return the chunk form of a class."""
    if form.columns:
        return DecayedColumns(form, rows, segments)
    if form.is_rank_one:
        return RankOneCorrection(form, rows, segments)
    return DeltaRule(form, rows, segments) if form.is_delta else Uncorrected(form, rows, segments)
