"""How a state decays along its rows: what reads and writes see of it at a chunk's edges, and within the chunk in pairs.

Readers are rows that read the state (the query, the correction's read), writers rows that it is written by (the key,
the correction's left side), each (n, L, R): n chunks of L tokens. The pair matrix of reader i, with rows x, and writer
w, with rows y, is pairs[i][w][n, t, j] = Σ_c x[t, c] y[j, c] exp(Σ of the log decays in (j, t]), j < t; an exclusive
reader stops at t - 1. The first reader sees its own token's write too, unless it is exclusive. A reset empties the
state before all that its token does: pairs in different segments see nothing of each other, exclusive or not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnc.runtime.recurrent.levels import (
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
"""Matrices of each reader with each writer, (n, L, L)."""

Sides = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Readers and writers, or their adjoints."""

LEAST = -1000.0
"""A log decay that is as good as -inf: its exponential is 0 in fp64 too, and it may be subtracted from itself."""


class DocumentSegments:
    """The documents of a chunk's tokens: `counts` (n, L) are the resets in the chunk up to each token."""

    def __init__(self, counts: Tensor, dtype: torch.dtype) -> None:
        self.same = (counts[:, :, None] == counts[:, None, :]).to(dtype)
        self.from_start = (counts == 0).to(dtype)[..., None]
        self.to_end = (counts == counts[:, -1:]).to(dtype)[..., None]

    @property
    def whole(self) -> Tensor:
        """Whether the state before the chunk is seen after it, (n, 1, 1)."""
        return self.from_start[:, -1:]


class EdgeAdjoints(NamedTuple):
    """Adjoints of readers that entered, of writers that left, and of `total` (n, 1, R).

    `first`: of readers' first rows (n, 1, R) again, in fp64; for a scalar gate.
    """

    readers: Sequence[Tensor]
    writers: Sequence[Tensor]
    kept: Tensor
    first: Sequence[Tensor] = ()


class ChunkDecay(ABC):
    """The decay of one stretch of chunks, of which an heir tells `into` and `out_of` of no resets, and `total`.

    `into` (n, L, R or 1) one a reader, `out_of` (n, L, R or 1), `total` (n, 1, R or 1): what is left of the state
    before the chunk at each token, of what a token writes at the chunk's end, of the one at the other. `exclusive` has
    one entry a reader.
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
        """Readers as they see the state before the chunk."""
        return [x * into for x, into in zip(readers, self.into, strict=True)]

    def leave(self, writers: Sequence[Tensor]) -> list[Tensor]:
        """Writers as the state after the chunk has them."""
        return [y * self.out_of for y in writers]

    def folded(self, x: Tensor) -> Tensor:
        """`x` (…, R), summed where all channels share a gate."""
        return x if self.total.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)

    def inclusive(self, terms: Sequence[Tensor]) -> Tensor:
        """The sum of one adjoint a reader; an exclusive reader's stands at the token before, whose decay ends it."""
        return summed([advanced(term) if each else term for term, each in zip(terms, self.exclusive, strict=True)])

    @abstractmethod
    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Pairs:
        """The pair matrices."""

    @abstractmethod
    def adjoint(
        self, d_pairs: Pairs, pairs: Pairs, sides: Sides, edges: Sides, d_edges: EdgeAdjoints
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """(gradients of the readers, of the writers, of the log decays); `edges` are what enters and what leaves.

        `d_pairs` is overwritten.
        """

    def _from_edges(self, d_edges: EdgeAdjoints) -> tuple[list[Tensor], list[Tensor]]:
        """Return the adjoints of readers and writers from those of the chunk's edges."""
        d_readers = [d * into for d, into in zip(d_edges.readers, self.into, strict=True)]
        return d_readers, [d * self.out_of for d in d_edges.writers]

    def _edge_adjoints(self, edges: Sides, d_edges: EdgeAdjoints) -> tuple[Tensor, Tensor, Tensor]:
        """The adjoints of the exponents of `into`, inclusive, `out_of` and `total`."""
        into = [self.folded(x * d) for x, d in zip(edges[0], d_edges.readers, strict=True)]
        leaving = [self.folded(y * d) for y, d in zip(edges[1], d_edges.writers, strict=True)]
        return self.inclusive(into), summed(leaving), self.folded(self.total * d_edges.kept)

    def _set_diagonal(self, pairs: Pairs, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> None:
        """Where the first reader sees its own token's write."""
        if not self.exclusive[0]:
            for own, y in zip(pairs[0], writers, strict=True):
                own.diagonal(dim1=1, dim2=2).copy_(row_products(readers[0], y))


class ScalarDecay(ChunkDecay):
    """One gate (n, L, 1) for all rows: the pair matrix is a plain product, weighted.

    All is sums of the gate in fp64, and differences of them, which lose nothing there; so are their exponentials where
    the gate is fp64.
    """

    def __init__(
        self, gate: Tensor, dtype: torch.dtype, segments: DocumentSegments | None, exclusive: Sequence[bool]
    ) -> None:
        sums = gate.double().clamp(min=LEAST).cumsum(1)
        total = sums[:, -1:]
        into = sums.exp().to(dtype)
        super().__init__(
            [delayed(into, 1) if each else into for each in exclusive],
            (total - sums).exp().to(dtype),
            total.exp().to(dtype),
            segments,
            exclusive,
        )
        weights = torch.sub(sums, sums.mT, out=gate.new_empty(*gate.shape[:2], gate.shape[1])).exp_()
        weights = weights.to(dtype).tril_()  # above, where exponents rise, whatever is there
        if segments:
            weights *= segments.same
        later = None
        if any(exclusive):
            later = delayed(weights, 0)
            if segments:
                later *= segments.same
        self.weights = [weights if later is None or not each else later for each in exclusive]
        """One a reader, (n, L, L)."""

    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Pairs:
        """The diagonal anew, by `row_products`."""
        result = products(readers, writers)
        self._weigh(result)
        self._set_diagonal(result, readers, writers)
        return result

    def adjoint(
        self, d_pairs: Pairs, pairs: Pairs, sides: Sides, edges: Sides, d_edges: EdgeAdjoints
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """A gate gets the sum over the pairs on both sides of it, and over what enters and leaves past it; in fp64."""
        d_readers, d_writers = self._from_edges(d_edges)
        self._set_nearest(pairs, sides)
        crossing = self.inclusive(
            [
                summed([d * own for d, own in zip(d_row, row, strict=True)])
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
        """As `set_nearest`, of readers and writers under their decay."""
        if pairs[0][0].shape[1] <= 2:
            return
        set_nearest(pairs, *sides, self.exclusive)
        for row, weights, each in zip(pairs, self.weights, self.exclusive, strict=True):
            for own in row:
                nearest(own, each).mul_(nearest(weights, each))

    def _weigh(self, pairs: Pairs) -> None:
        for i, (row, each, weights) in enumerate(zip(pairs, self.exclusive, self.weights, strict=True)):
            for own in row:
                own.mul_(weights)
                if i and not each:
                    own.diagonal(dim1=1, dim2=2).zero_()


class NoDecay(ChunkDecay):
    """None at all: the pair matrix is a plain product, and what enters and leaves is as it was."""

    def __init__(self, like: Tensor, exclusive: Sequence[bool]) -> None:
        one = like.new_ones(()).expand(like.shape[0], 1, 1)
        super().__init__([one] * len(exclusive), one, one, None, exclusive)

    def enter(self, readers: Sequence[Tensor]) -> list[Tensor]:
        """The readers."""
        return list(readers)

    def leave(self, writers: Sequence[Tensor]) -> list[Tensor]:
        """The writers."""
        return list(writers)

    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Pairs:
        """As of a scalar decay."""
        result = products(readers, writers)
        self._hide(result)
        self._set_diagonal(result, readers, writers)
        return result

    def adjoint(
        self, d_pairs: Pairs, pairs: Pairs, sides: Sides, edges: Sides, d_edges: EdgeAdjoints
    ) -> tuple[list[Tensor], list[Tensor], None]:
        """None for the log decays."""
        d_readers, d_writers = list(d_edges.readers), list(d_edges.writers)
        self._hide(d_pairs)
        add_product_adjoints(d_pairs, sides, (d_readers, d_writers))
        return d_readers, d_writers, None

    def _hide(self, pairs: Pairs) -> None:
        for i, (row, each) in enumerate(zip(pairs, self.exclusive, strict=True)):
            for own in row:
                own.tril_(-1 if i or each else 0)


class RowDecay(ChunkDecay):
    """A gate of its own for each row (n, L, R): a product a level, the decay split between its operands."""

    def __init__(
        self, gate: Tensor, dtype: torch.dtype, segments: DocumentSegments | None, exclusive: Sequence[bool]
    ) -> None:
        self.sums = block_sums(gate, dtype)
        into = [self.sums.enter(each) for each in exclusive]
        super().__init__(into, self.sums.out_of, self.sums.total, segments, exclusive)

    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Pairs:
        """A product a level; the diagonal apart."""
        n, length, _ = readers[0].shape
        result = [[x.new_zeros(n, length, length) for _ in writers] for x in readers]
        for level in self.sums.levels:
            rising, falling = self._at_level(level, readers, writers)
            found = rising.flatten(2, 3) @ falling.flatten(2, 3).mT
            for row, own_rows in zip(result, found.chunk(len(readers), 2), strict=True):
                for pairs, own in zip(row, own_rows.chunk(len(writers), 3), strict=True):
                    below(pairs, level.block).copy_(own)
        self._set_diagonal(result, readers, writers)
        self._hide(result)
        return result

    def adjoint(
        self, d_pairs: Pairs, pairs: Pairs, sides: Sides, edges: Sides, d_edges: EdgeAdjoints
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Two products a level; a gate's share is a factor times its adjoint."""
        d_readers, d_writers = d_sides = self._from_edges(d_edges)
        self._hide(d_pairs)
        if not self.exclusive[0]:
            for own, y, d_writer in zip(d_pairs[0], sides[1], d_writers, strict=True):
                on_diagonal = own.diagonal(dim1=1, dim2=2)[..., None]
                d_readers[0].addcmul_(on_diagonal, y)
                d_writer.addcmul_(on_diagonal, sides[0][0])
        levels = [self._level_adjoint(level, d_pairs, sides, d_sides) for level in self.sums.levels]
        return d_readers, d_writers, gate_gradient(SumAdjoints(levels, *self._edge_adjoints(edges, d_edges)))

    def _at_level(
        self, level: DecayLevel, readers: Sequence[Tensor], writers: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Readers of odd blocks, (n, L / 2b, readers, b, R), and writers of even ones, each with its share of decay."""
        like = odd(readers[0], level.block)
        rising, falling = (like.new_empty(*like.shape[:2], len(x), *like.shape[2:]) for x in (readers, writers))
        for i, (x, exclusive) in enumerate(zip(readers, self.exclusive, strict=True)):
            torch.mul(odd(x, level.block), level.rises(exclusive), out=rising[:, :, i])
        for w, y in enumerate(writers):
            torch.mul(even(y, level.block), level.fall, out=falling[:, :, w])
        return rising, falling

    def _level_adjoint(self, level: DecayLevel, d_pairs: Pairs, sides: Sides, d_sides: Sides) -> tuple[Tensor, Tensor]:
        rising, falling = self._at_level(level, *sides)
        blocks = torch.cat(
            [torch.cat([below(own, level.block) for own in row], 3) for row in d_pairs],
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
        if self.segments:
            for own in (own for row in pairs for own in row):
                own.mul_(self.segments.same)


def summed(terms: Sequence[Tensor]) -> Tensor:
    """The sum of one tensor or more."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Σ x y of each row, (…, R) → (…), added up by halves: under strong decay a token's own pair is all there is."""
    return (x * y).sum(-1)


def nearest(matrix: Tensor, exclusive: bool) -> Tensor:
    """Return a view of the pairs in (n, L, L) with one gate between them: (n, L - 1), or (n, L - 2)."""
    return matrix.diagonal(-2 if exclusive else -1, dim1=1, dim2=2)


def set_nearest(pairs: Pairs, readers: Sequence[Tensor], writers: Sequence[Tensor], exclusive: Sequence[bool]) -> None:
    """Products of rows with one gate between them anew, in fp64: a strong gate's gradient is theirs alone."""
    for row, x, each in zip(pairs, readers, exclusive, strict=True):
        ahead = 2 if each else 1
        for own, y in zip(row, writers, strict=True):
            nearest(own, each).copy_(row_products(x[:, ahead:].double(), y[:, :-ahead].double()))


def products(readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Pairs:
    """Return the products of every reader's rows and every writer's."""
    return [[x @ y.mT for y in writers] for x in readers]


def add_product_adjoints(d_products: Pairs, sides: Sides, d_sides: Sides) -> None:
    """Add the adjoints of readers and writers, from that of `products`, to `d_sides`."""
    for i, x in enumerate(sides[0]):
        for w, y in enumerate(sides[1]):
            d_sides[0][i].baddbmm_(d_products[i][w], y)
            d_sides[1][w].baddbmm_(d_products[i][w].mT, x)
