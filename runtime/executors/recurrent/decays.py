"""The decay of a state along its rows: factors of readers and writers at a chunk's edges, pair matrices within it.

Readers are the vectors that read the state (the query, the correction's read). Writers are the vectors that write to it
(the key, the correction's left side). Both are (n, L, R): n chunks of L tokens. The pair matrix of reader i, with rows
x, and writer w, with rows y, is pairs[i][w][n, t, j] = Σ_c x[t, c] y[j, c] exp(Σ of the log decays in (j, t]), j < t;
an exclusive reader stops at t - 1. The first reader also sees its own token's write, unless it is exclusive. A reset
sets the state to zero before its token's read and steps: pairs in different segments are 0, for exclusive readers too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnc.runtime.executors.recurrent.levels import (
    DecayLevel,
    SumAdjoints,
    advanced,
    below,
    block_sums,
    delayed,
    even,
    gate_gradient,
    odd,
    weighted,
)

Pairs = list[list[Tensor]]
"""The pair matrices (n, L, L) of each reader with each writer."""

Sides = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Readers and writers, or their adjoints."""

LEAST = -1000.0
"""A finite log decay in place of -inf: its exponential is 0 even in fp64, and its differences are not NaN."""


class DocumentSegments:
    """The documents of a chunk's tokens. `counts` (n, L): the number of resets in the chunk up to each token."""

    def __init__(self, counts: Tensor, dtype: torch.dtype) -> None:
        self.same = (counts[:, :, None] == counts[:, None, :]).to(dtype)
        self.from_start = (counts == 0).to(dtype)[..., None]
        self.to_end = (counts == counts[:, -1:]).to(dtype)[..., None]

    @property
    def whole(self) -> Tensor:
        """1 where the state before the chunk is part of the state after it, else 0; (n, 1, 1)."""
        return self.from_start[:, -1:]


class EdgeAdjoints(NamedTuple):
    """Adjoints of the results of `enter` (`readers`) and `leave` (`writers`), and of `total` (`kept`, (n, 1, R)).

    `first`: the adjoints of the readers' first rows (n, 1, R) again, in fp64; for a scalar gate.
    """

    readers: Sequence[Tensor]
    writers: Sequence[Tensor]
    kept: Tensor
    first: Sequence[Tensor] = ()


class ChunkDecay(ABC):
    """The decay of one stretch of chunks. Subclasses pass `into`, `out_of` and `total` without resets.

    `into`: for each reader the decay (n, L, R or 1) from the chunk's start to a token. `out_of` (n, L, R or 1): the
    decay from a token's write to the chunk's end. `total` (n, 1, R or 1): the decay over the whole chunk. `exclusive`:
    one entry per reader.
    """

    def __init__(
        self,
        into: Sequence[Tensor],
        out_of: Tensor,
        total: Tensor,
        segments: DocumentSegments | None,
        exclusive: Sequence[bool],
    ) -> None:
        self.exclusive = tuple(exclusive)
        self.segments = segments
        self.into, self.out_of, self.total = list(into), out_of, total
        if segments:
            self.into = [factor * segments.from_start for factor in into]
            self.out_of = out_of * segments.to_end
            self.total = total * segments.whole

    def enter(self, readers: Sequence[Tensor]) -> list[Tensor]:
        """Return the readers times the decay from the chunk's start: they read the state before the chunk."""
        return [x * into for x, into in zip(readers, self.into, strict=True)]

    def leave(self, writers: Sequence[Tensor]) -> list[Tensor]:
        """Return the writers times the decay to the chunk's end: they write the state after the chunk."""
        return [y * self.out_of for y in writers]

    def folded(self, x: Tensor) -> Tensor:
        """Return `x` (…, R), summed over channels if all channels share a gate."""
        return x if self.total.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)

    def inclusive(self, terms: Sequence[Tensor]) -> Tensor:
        """Sum the readers' adjoints; an exclusive reader's moves to the token before, the last whose decay it sees."""
        return summed([advanced(x) if exclusive else x for x, exclusive in zip(terms, self.exclusive, strict=True)])

    @abstractmethod
    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Pairs:
        """Compute the pair matrices."""

    @abstractmethod
    def adjoint(
        self, d_pairs: Pairs, pairs: Pairs, sides: Sides, edges: Sides, d_edges: EdgeAdjoints
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Compute (gradients of the readers, of the writers, of the log decays); overwrites `d_pairs`.

        `edges`: the results of `enter` and of `leave`.
        """

    def _from_edges(self, d_edges: EdgeAdjoints) -> tuple[list[Tensor], list[Tensor]]:
        """Return the adjoints of readers and writers through the chunk's edges."""
        d_readers = [d * into for d, into in zip(d_edges.readers, self.into, strict=True)]
        return d_readers, [d * self.out_of for d in d_edges.writers]

    def _edge_adjoints(self, edges: Sides, d_edges: EdgeAdjoints) -> tuple[Tensor, Tensor, Tensor]:
        """Return the adjoints of the exponents of `into` (inclusive), `out_of` and `total`."""
        into = [self.folded(x * d) for x, d in zip(edges[0], d_edges.readers, strict=True)]
        leaving = [self.folded(y * d) for y, d in zip(edges[1], d_edges.writers, strict=True)]
        return self.inclusive(into), summed(leaving), self.folded(self.total * d_edges.kept)

    def _set_diagonal(self, pairs: Pairs, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> None:
        """Set the diagonals of the first reader's pairs, where it sees its own token's write."""
        if not self.exclusive[0]:
            for matrix, y in zip(pairs[0], writers, strict=True):
                matrix.diagonal(dim1=1, dim2=2).copy_(row_products(readers[0], y))


class ScalarDecay(ChunkDecay):
    """One gate (n, L, 1) for all rows: the pair matrix is a matrix product times weights.

    Exponents are differences of sums of the gate, in fp64, where cancellation does no harm. Their exponentials are in
    fp64 too if the gate is.
    """

    def __init__(
        self, gate: Tensor, dtype: torch.dtype, segments: DocumentSegments | None, exclusive: Sequence[bool]
    ) -> None:
        sums = gate.double().clamp(min=LEAST).cumsum(1)
        total = sums[:, -1:]
        into = sums.exp().to(dtype)
        super().__init__(
            [delayed(into, 1) if is_exclusive else into for is_exclusive in exclusive],
            (total - sums).exp().to(dtype),
            total.exp().to(dtype),
            segments,
            exclusive,
        )
        weights = torch.sub(sums, sums.mT, out=gate.new_empty(*gate.shape[:2], gate.shape[1])).exp_()
        weights = weights.to(dtype).tril_()  # above the diagonal exponents are positive and may overflow
        if segments:
            weights *= segments.same
        exclusive_weights = None
        if any(exclusive):
            exclusive_weights = delayed(weights, 0)
            if segments:
                exclusive_weights *= segments.same
        self.weights = [
            weights if exclusive_weights is None or not is_exclusive else exclusive_weights
            for is_exclusive in exclusive
        ]
        """The decay weights (n, L, L) of each reader."""

    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Pairs:
        """Compute the pair matrices; their diagonals are computed by `row_products`."""
        result = products(readers, writers)
        self._weigh(result)
        self._set_diagonal(result, readers, writers)
        return result

    def adjoint(
        self, d_pairs: Pairs, pairs: Pairs, sides: Sides, edges: Sides, d_edges: EdgeAdjoints
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Compute the gradients; a gate's sums the pairs across it and the edge terms past it, in fp64."""
        d_readers, d_writers = self._from_edges(d_edges)
        self._set_nearest(pairs, sides)
        crossing = self.inclusive(
            [
                summed([d * matrix for d, matrix in zip(d_row, row, strict=True)])
                for d_row, row in zip(d_pairs, pairs, strict=True)
            ]
        )
        self._weigh(d_pairs)
        add_product_adjoints(d_pairs, sides, (d_readers, d_writers))
        into, leaving, total = (x.double() for x in self._edge_adjoints(edges, d_edges))
        if d_edges.first and not any(self.exclusive):
            into[:, :1] = summed([self.folded(x[:, :1] * d) for x, d in zip(edges[0], d_edges.first, strict=True)])
        across = crossing.cumsum(-1, dtype=torch.float64).tril_(-1).sum(1)[..., None]
        gate = into.flip(1).cumsum(1).flip(1) + delayed(across + leaving.cumsum(1), 0) + total
        return d_readers, d_writers, gate.to(d_readers[0].dtype)

    def _set_nearest(self, pairs: Pairs, sides: Sides) -> None:
        """Recompute the nearest pairs as `set_nearest` does, times their decay."""
        if pairs[0][0].shape[1] <= 2:
            return
        set_nearest(pairs, *sides, self.exclusive)
        for row, weights, exclusive in zip(pairs, self.weights, self.exclusive, strict=True):
            for matrix in row:
                nearest(matrix, exclusive).mul_(nearest(weights, exclusive))

    def _weigh(self, pairs: Pairs) -> None:
        """Multiply pairs by their decay in place; readers after the first do not see their own token."""
        for i, (row, exclusive, weights) in enumerate(zip(pairs, self.exclusive, self.weights, strict=True)):
            for matrix in row:
                matrix.mul_(weights)
                if i and not exclusive:
                    matrix.diagonal(dim1=1, dim2=2).zero_()


class NoDecay(ChunkDecay):
    """No decay: the pair matrix is a plain product, and edges do not change readers and writers."""

    def __init__(self, like: Tensor, exclusive: Sequence[bool]) -> None:
        unit = like.new_ones(()).expand(like.shape[0], 1, 1)
        super().__init__([unit] * len(exclusive), unit, unit, None, exclusive)

    def enter(self, readers: Sequence[Tensor]) -> list[Tensor]:
        """Return the readers unchanged."""
        return list(readers)

    def leave(self, writers: Sequence[Tensor]) -> list[Tensor]:
        """Return the writers unchanged."""
        return list(writers)

    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Pairs:
        """Compute the pair matrices; their diagonals are computed by `row_products`."""
        result = products(readers, writers)
        self._hide(result)
        self._set_diagonal(result, readers, writers)
        return result

    def adjoint(
        self, d_pairs: Pairs, pairs: Pairs, sides: Sides, edges: Sides, d_edges: EdgeAdjoints
    ) -> tuple[list[Tensor], list[Tensor], None]:
        """Compute the gradients of readers and writers; the log decays have none."""
        d_readers, d_writers = list(d_edges.readers), list(d_edges.writers)
        self._hide(d_pairs)
        add_product_adjoints(d_pairs, sides, (d_readers, d_writers))
        return d_readers, d_writers, None

    def _hide(self, pairs: Pairs) -> None:
        """Set pairs that are not visible to 0, in place."""
        for i, (row, exclusive) in enumerate(zip(pairs, self.exclusive, strict=True)):
            for matrix in row:
                matrix.tril_(-1 if i or exclusive else 0)


class RowDecay(ChunkDecay):
    """A separate gate for each row (n, L, R): one matrix product per level, the decay split between its operands."""

    def __init__(
        self, gate: Tensor, dtype: torch.dtype, segments: DocumentSegments | None, exclusive: Sequence[bool]
    ) -> None:
        self.sums = block_sums(gate, dtype)
        into = [self.sums.enter(is_exclusive) for is_exclusive in exclusive]
        super().__init__(into, self.sums.out_of, self.sums.total, segments, exclusive)

    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Pairs:
        """Compute the pair matrices by one product per level, and their diagonals separately."""
        n, length, _ = readers[0].shape
        result = [[x.new_zeros(n, length, length) for _ in writers] for x in readers]
        for level in self.sums.levels:
            rising, falling = self._at_level(level, readers, writers)
            blocks = rising.flatten(2, 3) @ falling.flatten(2, 3).mT
            for row, reader_blocks in zip(result, blocks.chunk(len(readers), 2), strict=True):
                for matrix, pair_blocks in zip(row, reader_blocks.chunk(len(writers), 3), strict=True):
                    below(matrix, level.block).copy_(pair_blocks)
        self._set_diagonal(result, readers, writers)
        self._hide(result)
        return result

    def adjoint(
        self, d_pairs: Pairs, pairs: Pairs, sides: Sides, edges: Sides, d_edges: EdgeAdjoints
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Compute the gradients by two products per level; a factor times its adjoint is added to its gates."""
        d_readers, d_writers = d_sides = self._from_edges(d_edges)
        self._hide(d_pairs)
        if not self.exclusive[0]:
            for matrix, y, d_writer in zip(d_pairs[0], sides[1], d_writers, strict=True):
                on_diagonal = matrix.diagonal(dim1=1, dim2=2)[..., None]
                d_readers[0].addcmul_(on_diagonal, y)
                d_writer.addcmul_(on_diagonal, sides[0][0])
        levels = [self._level_adjoint(level, d_pairs, sides, d_sides) for level in self.sums.levels]
        return d_readers, d_writers, gate_gradient(SumAdjoints(levels, *self._edge_adjoints(edges, d_edges)))

    def _at_level(
        self, level: DecayLevel, readers: Sequence[Tensor], writers: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the decayed readers of odd blocks, (n, L / 2b, readers, b, R), and writers of even blocks."""
        like = odd(readers[0], level.block)
        rising, falling = (like.new_empty(*like.shape[:2], len(x), *like.shape[2:]) for x in (readers, writers))
        for i, (x, exclusive) in enumerate(zip(readers, self.exclusive, strict=True)):
            torch.mul(odd(x, level.block), level.rises(exclusive), out=rising[:, :, i])
        for w, y in enumerate(writers):
            torch.mul(even(y, level.block), level.fall, out=falling[:, :, w])
        return rising, falling

    def _level_adjoint(self, level: DecayLevel, d_pairs: Pairs, sides: Sides, d_sides: Sides) -> tuple[Tensor, Tensor]:
        """Add a level's adjoints to `d_sides`; return those of the exponents of `rise` and `fall`."""
        rising, falling = self._at_level(level, *sides)
        blocks = torch.cat(
            [torch.cat([below(matrix, level.block) for matrix in row], 3) for row in d_pairs],
            2,
        )
        d_rising = weighted(blocks, falling.flatten(2, 3)).view(rising.shape)
        d_falling = weighted(blocks.mT, rising.flatten(2, 3)).view(falling.shape)
        for i, (d, exclusive) in enumerate(zip(d_sides[0], self.exclusive, strict=True)):
            odd(d, level.block).addcmul_(level.rises(exclusive), d_rising[:, :, i])
        for w, d in enumerate(d_sides[1]):
            even(d, level.block).addcmul_(level.fall, d_falling[:, :, w])
        return self.inclusive(rising.mul_(d_rising).unbind(2)), falling.mul_(d_falling).sum(2)

    def _hide(self, pairs: Pairs) -> None:
        """Set pairs in different documents to 0, in place."""
        if self.segments:
            for matrix in (matrix for row in pairs for matrix in row):
                matrix.mul_(self.segments.same)


def summed(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of one tensor or more."""
    first, *others = terms
    for term in others:
        first = first + term
    return first


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Return Σ x y over the last axis, (…, R) → (…), by pairwise summation: strong decay leaves only this pair."""
    return (x * y).sum(-1)


def nearest(matrix: Tensor, exclusive: bool) -> Tensor:
    """Return a view of the pairs in (n, L, L) with one gate between them: (n, L - 1), or (n, L - 2)."""
    return matrix.diagonal(-2 if exclusive else -1, dim1=1, dim2=2)


def set_nearest(pairs: Pairs, readers: Sequence[Tensor], writers: Sequence[Tensor], exclusive: Sequence[bool]) -> None:
    """Recompute pairs with one gate between them, in fp64: a strong gate's gradient comes from them alone."""
    for row, x, is_exclusive in zip(pairs, readers, exclusive, strict=True):
        ahead = 2 if is_exclusive else 1
        for matrix, y in zip(row, writers, strict=True):
            nearest(matrix, is_exclusive).copy_(row_products(x[:, ahead:].double(), y[:, :-ahead].double()))


def products(readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Pairs:
    """Return the products of every reader's rows with every writer's rows."""
    return [[x @ y.mT for y in writers] for x in readers]


def add_product_adjoints(d_products: Pairs, sides: Sides, d_sides: Sides) -> None:
    """Add the adjoints of readers and writers, computed from the adjoints of `products`, to `d_sides`."""
    for i, x in enumerate(sides[0]):
        for w, y in enumerate(sides[1]):
            d_sides[0][i].baddbmm_(d_products[i][w], y)
            d_sides[1][w].baddbmm_(d_products[i][w].mT, x)
