"""The chunk forms with decay along rows: without a correction, with the delta rule, with any correction of rank one.

For a chunk that starts with the state S, with pair matrices A (`decays`), readers q and r, and writers k and u:

    o = (q ⊙ into) S + A_q values          S′ = total ⊙ S + (writers ⊙ out of)ᵀ values

The forms differ in their values: v, the solution of a triangular system, or both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
from attnc.runtime.executors.recurrent.triangle import inverse

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class ChunkRows:
    """The tensors of a stretch of n chunks of L rows, (n, L, ·), None if absent; a gate has R channels, or 1 for all.

    `read` None: corrections read by the key. `before`: outputs read the state before their token. `old`: corrections
    read the state before its decay.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    columns: Tensor | None
    beta: Tensor | None
    read: Tensor | None
    left: Tensor | None
    segments: DocumentSegments | None
    before: bool
    old: bool


class Uncorrected:
    """S′ = D S + k vᵀ: the values are v (Yang et al. 2024, "Gated Linear Attention", section 4; Dao and Gu 2024)."""

    def __init__(self, rows: ChunkRows) -> None:
        self.rows = rows
        self.readers, self.writers = self._sides()
        self.decay = self._decay()
        self.pairs = self.decay.pairs(self.readers, self.writers)
        self.entering, self.leaving = self.decay.enter(self.readers), self.decay.leave(self.writers)
        self.corrector = self._corrector()

    def _decay(self) -> ChunkDecay:
        rows, exclusive = self.rows, (self.rows.before, self.rows.old)[: len(self.readers)]
        if rows.gate is None and rows.segments is None:
            return NoDecay(rows.k, exclusive)
        gate = rows.k.new_zeros(*rows.k.shape[:2], 1) if rows.gate is None else rows.gate
        kind = ScalarDecay if gate.shape[-1] == 1 else RowDecay
        return kind(gate, rows.k.dtype, rows.segments, exclusive)

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
        if not self.rows.before:
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
        return gradients | self._named(d_readers, d_writers)

    def _sides(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.rows.q], [self.rows.k]

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

    def _named(self, d_readers: list[Tensor], d_writers: list[Tensor]) -> Gradients:
        return {"q": d_readers[0], "k": d_writers[0]}


class DeltaRule(Uncorrected):
    """S′ = (I - β k rᵀ) D S + β k vᵀ: write and correction share one system, (I + β A_r) values = β (v - r S).

    Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 3.2; with
    gates Yang, Kautz and Hatamizadeh 2025, "Gated Delta Networks", section 3.3.
    """

    def _sides(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.rows.q, self.rows.k if self.rows.read is None else self.rows.read], [self.rows.k]

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

    def _named(self, d_readers: list[Tensor], d_writers: list[Tensor]) -> Gradients:
        if self.rows.read is None:
            return {"q": d_readers[0], "k": d_writers[0] + d_readers[1]}
        return {"q": d_readers[0], "k": d_writers[0], "read": d_readers[1]}


class RankOneCorrection(Uncorrected):
    """S′ = D S + u (rᵀ D S) + k vᵀ, or with rᵀ S: solves for the corrections' reads, p = (I - A_ru)⁻¹ (r S + A_rk v).

    The values are v and p (the generalised delta rule of RWKV-7, Peng et al. 2025, section 4, with S transposed).
    """

    def _sides(self) -> tuple[list[Tensor], list[Tensor]]:
        assert self.rows.read is not None
        assert self.rows.left is not None
        return [self.rows.q, self.rows.read], [self.rows.k, self.rows.left]

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

    def _named(self, d_readers: list[Tensor], d_writers: list[Tensor]) -> Gradients:
        return {"q": d_readers[0], "k": d_writers[0], "read": d_readers[1], "left": d_writers[1]}
