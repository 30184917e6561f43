"""How a state decays along its rows: what reads and writes see of it at a chunk's edges, and within the chunk in pairs.

Readers are rows that read the state (the query, the correction's read), writers rows that it is written by (the key,
the correction's left side), each (n, L, R): n chunks of L tokens. The pair matrix of readers x and writers y is
pairs[:, i, t, w, j] = Σ_c x_i[t, c] y_w[j, c] exp(Σ of the log decays in (j, t]), j < t; an exclusive reader stops at
t - 1. The first reader sees its own token's write too, unless it is exclusive. A reset empties the state before all
that its token does: pairs in different segments see nothing of each other, exclusive or not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnc.runtime.recurrent.levels import (
    BlockSums,
    SumAdjoints,
    advanced,
    below,
    delayed,
    even,
    gate_gradient,
    odd,
    weighted,
)

LevelAdjoints = list[tuple[Tensor, Tensor]]


class Segments:
    """Which tokens of a chunk share a document: `counts` (n, L) are the resets in the chunk up to each token."""

    def __init__(self, counts: Tensor, dtype: torch.dtype) -> None:
        self.same = (counts[:, :, None] == counts[:, None, :]).to(dtype)
        self.from_start = (counts == 0).to(dtype)[..., None]
        self.to_end = (counts == counts[:, -1:]).to(dtype)[..., None]

    @property
    def whole(self) -> Tensor:
        """Whether the state before the chunk is seen after it, (n, 1, 1)."""
        return self.from_start[:, -1:]


class EdgeAdjoints(NamedTuple):
    """Adjoints of readers that entered, of writers that left, and of `total` (n, 1, R)."""

    readers: Sequence[Tensor]
    writers: Sequence[Tensor]
    kept: Tensor


class Decay(ABC):
    """The decay of one stretch of chunks, (n, L, F); `exclusive` has one entry a reader."""

    def __init__(self, sums: BlockSums, segments: Segments | None, exclusive: Sequence[bool]) -> None:
        self.sums = sums
        self.exclusive = tuple(exclusive)
        self.segments = segments
        self.into = [self.sums.enter(each) for each in exclusive]
        self.out_of, self.total = self.sums.out_of, self.sums.total
        if segments:
            self.into = [factor * segments.from_start for factor in self.into]
            self.out_of = self.out_of * segments.to_end
            self.total = self.total * segments.whole

    def enter(self, readers: Sequence[Tensor]) -> list[Tensor]:
        """Readers as they see the state before the chunk."""
        return [x * into for x, into in zip(readers, self.into, strict=True)]

    def leave(self, writers: Sequence[Tensor]) -> list[Tensor]:
        """Writers as the state after the chunk has them."""
        return [y * self.out_of for y in writers]

    def folded(self, x: Tensor) -> Tensor:
        """`x` (…, R), summed where all channels share a gate."""
        return x if self.sums.total.shape[-1] == x.shape[-1] else x.sum(-1, keepdim=True)

    def inclusive(self, terms: Sequence[Tensor]) -> Tensor:
        """The sum of one adjoint a reader; an exclusive reader's stands at the token before, whose decay ends it."""
        return summed([advanced(term) if each else term for term, each in zip(terms, self.exclusive, strict=True)])

    @abstractmethod
    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Tensor:
        """The pair matrices (n, readers, L, writers, L)."""

    @abstractmethod
    def add_pair_adjoints(
        self,
        d_pairs: Tensor,
        pairs: Tensor,
        sides: tuple[Sequence[Tensor], Sequence[Tensor]],
        d_sides: tuple[Sequence[Tensor], Sequence[Tensor]],
    ) -> LevelAdjoints:
        """Add to `d_sides` what the adjoint of `pairs` gives readers and writers; `d_pairs` is overwritten."""

    def adjoint(
        self,
        d_pairs: Tensor,
        pairs: Tensor,
        sides: tuple[Sequence[Tensor], Sequence[Tensor]],
        edges: tuple[Sequence[Tensor], Sequence[Tensor]],
        d_edges: EdgeAdjoints,
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """(gradients of the readers, of the writers, of the log decays); `edges` are what enters and what leaves."""
        d_readers = [d * into for d, into in zip(d_edges.readers, self.into, strict=True)]
        d_writers = [d * self.out_of for d in d_edges.writers]
        levels = self.add_pair_adjoints(d_pairs, pairs, sides, (d_readers, d_writers))
        into = [self.folded(x * d) for x, d in zip(edges[0], d_edges.readers, strict=True)]
        leaving = [self.folded(y * d) for y, d in zip(edges[1], d_edges.writers, strict=True)]
        adjoints = SumAdjoints(levels, self.inclusive(into), summed(leaving), self.folded(self.total * d_edges.kept))
        return d_readers, d_writers, gate_gradient(adjoints)

    def _set_diagonal(self, pairs: Tensor, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> None:
        """Where the first reader sees its own token's write."""
        if not self.exclusive[0]:
            for w, y in enumerate(writers):
                pairs[:, 0, :, w].diagonal(dim1=1, dim2=2).copy_(row_products(readers[0], y))


class ScalarDecay(Decay):
    """One gate (n, L, 1) for all rows: the pair matrix is a plain product, weighted."""

    def __init__(self, sums: BlockSums, segments: Segments | None, exclusive: Sequence[bool]) -> None:
        super().__init__(sums, segments, exclusive)
        weights = self._weights()
        if segments:
            weights *= segments.same
        later = None
        if any(exclusive):
            later = delayed(weights, 0)
            if segments:
                later *= segments.same
        self.weights = [weights if later is None or not each else later for each in exclusive]
        """One a reader, (n, L, L)."""

    def _weights(self) -> Tensor:
        """exp of the sums in (j, t], (n, L, L), with 1 on the diagonal."""
        n, length, _ = self.sums.into.shape
        weights = self.sums.into.new_zeros(n, length, length)
        weights.diagonal(dim1=1, dim2=2).fill_(1)
        for level in self.sums.levels:
            torch.mul(level.rise, level.fall.mT, out=below(weights, level.block))
        return weights

    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Tensor:
        """One product for all writers.

        The diagonal anew, by `row_products`.
        """
        result = products(readers, writers)
        self._weigh(result)
        self._set_diagonal(result, readers, writers)
        return result

    def _weigh(self, pairs: Tensor) -> None:
        for i, (each, weights) in enumerate(zip(self.exclusive, self.weights, strict=True)):
            pairs[:, i].mul_(weights[:, :, None])
            if i and not each:
                for w in range(pairs.shape[3]):
                    pairs[:, i, :, w].diagonal(dim1=1, dim2=2).zero_()

    def add_pair_adjoints(
        self,
        d_pairs: Tensor,
        pairs: Tensor,
        sides: tuple[Sequence[Tensor], Sequence[Tensor]],
        d_sides: tuple[Sequence[Tensor], Sequence[Tensor]],
    ) -> LevelAdjoints:
        """Two products; a gate's share is the sum over the pairs on both sides of it."""
        crossing = self.inclusive(list((d_pairs * pairs).sum(3).unbind(1)))
        self._weigh(d_pairs)
        add_product_adjoints(d_pairs, sides, d_sides)
        blocks = [below(crossing, level.block) for level in self.sums.levels]
        return [(block.sum(-1)[..., None], block.sum(-2)[..., None]) for block in blocks]


class NoDecay(Decay):
    """None at all: the pair matrix is a plain product, and what enters and leaves is as it was."""

    def __init__(self, like: Tensor, exclusive: Sequence[bool]) -> None:
        self.exclusive = tuple(exclusive)
        self.segments = None
        n, length, _ = like.shape
        self.total = like.new_ones(()).expand(n, 1, 1)
        full = like.new_ones(length, length)
        self._seen = [full.tril(-1 if i or each else 0) for i, each in enumerate(exclusive)]

    def enter(self, readers: Sequence[Tensor]) -> list[Tensor]:
        """The readers."""
        return list(readers)

    def leave(self, writers: Sequence[Tensor]) -> list[Tensor]:
        """The writers."""
        return list(writers)

    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Tensor:
        """As of a scalar decay."""
        result = products(readers, writers)
        self._hide(result)
        self._set_diagonal(result, readers, writers)
        return result

    def add_pair_adjoints(
        self,
        d_pairs: Tensor,
        pairs: Tensor,
        sides: tuple[Sequence[Tensor], Sequence[Tensor]],
        d_sides: tuple[Sequence[Tensor], Sequence[Tensor]],
    ) -> LevelAdjoints:
        """Two products."""
        self._hide(d_pairs)
        add_product_adjoints(d_pairs, sides, d_sides)
        return []

    def adjoint(
        self,
        d_pairs: Tensor,
        pairs: Tensor,
        sides: tuple[Sequence[Tensor], Sequence[Tensor]],
        edges: tuple[Sequence[Tensor], Sequence[Tensor]],
        d_edges: EdgeAdjoints,
    ) -> tuple[list[Tensor], list[Tensor], None]:
        """(gradients of the readers, of the writers, None)."""
        d_readers, d_writers = list(d_edges.readers), list(d_edges.writers)
        self.add_pair_adjoints(d_pairs, pairs, sides, (d_readers, d_writers))
        return d_readers, d_writers, None

    def _hide(self, pairs: Tensor) -> None:
        for i, seen in enumerate(self._seen):
            pairs[:, i].mul_(seen[:, None])


class RowDecay(Decay):
    """A gate of its own for each row (n, L, R): a product a level, the decay split between its operands."""

    def pairs(self, readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Tensor:
        """A product a level, reader and writer; the diagonal apart."""
        n, length, _ = readers[0].shape
        result = readers[0].new_zeros(n, len(readers), length, len(writers), length)
        for level in self.sums.levels:
            falling = [even(y, level.block) * level.fall for y in writers]
            for i, (x, exclusive) in enumerate(zip(readers, self.exclusive, strict=True)):
                rising = odd(x, level.block) * level.rises(exclusive)
                for w, y in enumerate(falling):
                    below(result[:, i, :, w], level.block).copy_(rising @ y.mT)
        self._set_diagonal(result, readers, writers)
        if self.segments:
            result *= self.segments.same[:, None, :, None]
        return result

    def add_pair_adjoints(
        self,
        d_pairs: Tensor,
        pairs: Tensor,
        sides: tuple[Sequence[Tensor], Sequence[Tensor]],
        d_sides: tuple[Sequence[Tensor], Sequence[Tensor]],
    ) -> LevelAdjoints:
        """Two products a level, reader and writer; a gate's share is a factor times its adjoint."""
        if self.segments:
            d_pairs.mul_(self.segments.same[:, None, :, None])
        if not self.exclusive[0]:
            for w, y in enumerate(sides[1]):
                on_diagonal = d_pairs[:, 0, :, w].diagonal(dim1=1, dim2=2)[..., None]
                d_sides[0][0].addcmul_(on_diagonal, y)
                d_sides[1][w].addcmul_(on_diagonal, sides[0][0])
        return [self._at_level(at, d_pairs, sides, d_sides) for at in range(len(self.sums.levels))]

    def _at_level(
        self,
        at: int,
        d_pairs: Tensor,
        sides: tuple[Sequence[Tensor], Sequence[Tensor]],
        d_sides: tuple[Sequence[Tensor], Sequence[Tensor]],
    ) -> tuple[Tensor, Tensor]:
        level = self.sums.levels[at]
        rises = [level.rises(each) for each in self.exclusive]
        rising = [odd(x, level.block) * rise for x, rise in zip(sides[0], rises, strict=True)]
        falling = [even(y, level.block) * level.fall for y in sides[1]]
        blocks = [[below(d_pairs[:, i, :, w], level.block) for w in range(len(falling))] for i in range(len(rising))]
        d_rising = [summed([weighted(d, y) for d, y in zip(row, falling, strict=True)]) for row in blocks]
        d_falling = [
            summed([weighted(row[w].mT, x) for row, x in zip(blocks, rising, strict=True)]) for w in range(len(falling))
        ]
        for d, rise, add in zip(d_sides[0], rises, d_rising, strict=True):
            odd(d, level.block).addcmul_(rise, add)
        for d, add in zip(d_sides[1], d_falling, strict=True):
            even(d, level.block).addcmul_(level.fall, add)
        rise_terms = [x.mul_(d) for x, d in zip(rising, d_rising, strict=True)]
        fall_terms = [y.mul_(d) for y, d in zip(falling, d_falling, strict=True)]
        return self.inclusive(rise_terms), summed(fall_terms)


def summed(terms: Sequence[Tensor]) -> Tensor:
    """The sum of one tensor or more."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Σ x y of each row, (…, R) → (…), added up by halves: under strong decay a token's own pair is all there is."""
    return (x * y).sum(-1)


def products(readers: Sequence[Tensor], writers: Sequence[Tensor]) -> Tensor:
    """Of every reader's rows and every writer's, (n, readers, L, writers, L)."""
    n, length, _ = readers[0].shape
    result = readers[0].new_empty(n, len(readers), length, len(writers), length)
    for i, x in enumerate(readers):
        for w, y in enumerate(writers):
            torch.bmm(x, y.mT, out=result[:, i, :, w])
    return result


def add_product_adjoints(
    d_products: Tensor,
    sides: tuple[Sequence[Tensor], Sequence[Tensor]],
    d_sides: tuple[Sequence[Tensor], Sequence[Tensor]],
) -> None:
    """What the adjoint of `products` gives readers and writers, added to `d_sides`."""
    for i, x in enumerate(sides[0]):
        for w, y in enumerate(sides[1]):
            d_sides[0][i].baddbmm_(d_products[:, i, :, w], y)
            d_sides[1][w].baddbmm_(d_products[:, i, :, w].mT, x)


def by_side(product: Tensor, readers: int, writers: int) -> Tensor:
    """(n, readers · L, writers · L) → (n, readers, L, writers, L)."""
    n, rows, columns = product.shape
    return product.view(n, readers, rows // readers, writers, columns // writers)
