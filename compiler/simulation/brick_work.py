"""The live bricks of a relation over a grid of tokens, for bricks of every shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.analysis.live_tiles import TooManyTilesError
from attnc.compiler.analysis.separation import NotSeparableError, SeparatedAxis, TokenGrid, grid_of, separate_axes
from attnc.compiler.ir import Index
from attnc.compiler.planning.grids import parts_of, reads_coordinates
from attnc.compiler.simulation.strips import Int64, Strips, strips
from attnc.compiler.simulation.tile_work import Order, TileWork, joined
from attnc.spec.errors import EvaluationError

LONGEST_AXIS = 4096
"""Coordinates of an axis of a grid, whose pairs are looked at one by one."""

MOST_BRICKS = 1 << 26
"""Pairs of bricks that are looked at one by one, where a relation is several products."""


Natural = Callable[[Index, int, int, int, int], TileWork]
"""(relation, rows, keys, q tile, k tile) → the tiles of a pair of segments without a grid."""


def find_bricks(relation: Index, n_q: int, n_k: int, natural: Natural) -> BrickFinder | None:
    """The relation by bricks of its grid; None where it reads none with more than one axis, or does not separate.

    Of several segments, each pair of them has a grid, or is taken as it stands.
    """
    if not reads_coordinates(relation) or not fits_word(relation, (0, n_q), (0, n_k)):
        return None
    try:
        parts = [_segments(part.relation, part.n_q, part.n_k) for part in parts_of(relation, n_q, n_k)]
    except (NotSeparableError, EvaluationError):
        return None
    if not any(part.grid is not None and len(part.grid) > 1 for part in parts):
        return None
    return BrickFinder(parts, natural)


def _segments(relation: Index, n_q: int, n_k: int) -> _Segments:
    grid = grid_of(relation, n_q) if n_q == n_k else None
    if grid is None or max(axis.extent for axis in grid) > LONGEST_AXIS:
        return _Segments(n_q, n_k, relation, None, ())
    products = [(relation,)] if len(grid) == 1 else separate_axes(relation, grid)
    return _Segments(n_q, n_k, relation, grid, tuple(tuple(map(_Axis, p, grid)) for p in products))


@dataclass(frozen=True, eq=False)
class _Segments:
    """Rows and keys of two segments; the products of its relation, or no grid."""

    n_q: int
    n_k: int
    relation: Index
    grid: TokenGrid | None
    products: tuple[tuple[_Axis, ...], ...]


class _Axis:
    """A relation along one axis: visible pairs of every brick, for bricks whose sides are powers of two."""

    def __init__(self, relation: Index, axis: SeparatedAxis) -> None:
        self.extent = axis.extent
        self._relation = relation
        self._visible: dict[tuple[int, int], Int64] = {}
        self._live: dict[tuple[int, int], int] = {}

    def visible(self, q_side: int, k_side: int) -> Int64:
        """Visible pairs of every pair of bricks."""
        key = q_side, k_side
        if key not in self._visible:
            if key == (1, 1):
                span = (0, self.extent)
                found = exact_evaluation.mask(self._relation, span, span).astype(np.int64)
            elif q_side > 1:
                found = _folded(self.visible(q_side // 2, k_side))
            else:
                found = _folded(self.visible(q_side, k_side // 2).T).T
            self._visible[key] = found
        return self._visible[key]

    def area(self, q_side: int, k_side: int) -> Int64:
        """Pairs of every pair of bricks."""
        heights, widths = (_sides(self.extent, side) for side in (q_side, k_side))
        return np.multiply.outer(heights, widths)

    def live(self, q_side: int, k_side: int) -> int:
        """Pairs of bricks that see something of each other."""
        key = q_side, k_side
        if key not in self._live:
            self._live[key] = int((self.visible(q_side, k_side) > 0).sum())
        return self._live[key]


def _folded(counts: Int64) -> Int64:
    """Rows added in pairs."""
    if len(counts) % 2:
        counts = np.concatenate([counts, np.zeros((1, counts.shape[1]), dtype=np.int64)])
    return np.asarray(counts[0::2] + counts[1::2])


def _sides(extent: int, side: int) -> Int64:
    starts = np.arange(0, extent, side)
    return np.minimum(side, extent - starts)


class BrickFinder:
    """The bricks of a relation, of every shape."""

    def __init__(self, parts: Sequence[_Segments], natural: Natural) -> None:
        self._parts = parts
        self._natural = natural
        self._main = max((p for p in parts if p.grid is not None), key=lambda p: p.n_q)

    @property
    def axes(self) -> tuple[int, ...]:
        """The extents of the largest grid."""
        assert self._main.grid is not None
        return tuple(axis.extent for axis in self._main.grid)

    def shapes(self, tile: int) -> list[tuple[int, ...]]:
        """Every way to make a brick of so many tokens of sides that are powers of two."""
        return _shapes(tile, self.axes) or [_whole(tile, self.axes)]

    def best(self, q_tile: int, k_tile: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes of bricks of queries and of keys, those with the fewest live pairs first.

        Of a relation of several products, the sum of theirs is what counts here.
        """
        ranked = []
        for q_brick in self.shapes(q_tile):
            for k_brick in self.shapes(k_tile):
                ranked.append((self.live(q_brick, k_brick), q_brick != k_brick, q_brick, k_brick))
        return [(q, k) for _, _, q, k in sorted(ranked)]

    def live(self, q_brick: tuple[int, ...], k_brick: tuple[int, ...]) -> int:
        """Live pairs of bricks whose sides are powers of two, a pair of several products once for each."""
        return sum(
            prod(axis.live(a, b) for axis, a, b in zip(product, q_brick, k_brick, strict=True))
            for product in self._main.products
        )

    def pairs(self, q_brick: tuple[int, ...], k_brick: tuple[int, ...]) -> tuple[Int64, Int64] | None:
        """Visible and all pairs of every brick of queries with every brick of keys, by rows of bricks.

        None where the tokens are more than one grid, or the bricks too many to look at.
        """
        (first, *more), products = self._parts, self._main.products
        if more or first.grid is None:
            return None
        areas = [axis.area(a, b) for axis, a, b in zip(products[0], q_brick, k_brick, strict=True)]
        if prod(area.size for area in areas) > MOST_BRICKS:
            return None
        seen = [[x.visible(a, b) for x, a, b in zip(p, q_brick, k_brick, strict=True)] for p in products]
        return reduce(np.add, (reduce(np.kron, one) for one in seen)), reduce(np.kron, areas)

    def work(self, q_brick: tuple[int, ...], k_brick: tuple[int, ...]) -> TileWork:
        """The live bricks. Raises TooManyTilesError where there are too many to look at, and as `natural` does."""
        order = Order("bricks", q_brick, k_brick)
        q_tile, k_tile = prod(q_brick), prod(k_brick)
        found = []
        for part in self._parts:
            if part.grid is None:
                found.append(self._natural(part.relation, part.n_q, part.n_k, q_tile, k_tile))
            elif part.products:
                brick_finder = BrickFinder([part], self._natural)
                same = part.grid == self._main.grid
                found.append(
                    _brick_work(part, order) if same else brick_finder.work(*brick_finder.best(q_tile, k_tile)[0])
                )
        return joined(found, order, q_tile, k_tile)


def _shapes(tile: int, extents: Sequence[int]) -> list[tuple[int, ...]]:
    """Sides whose product is `tile`, none longer than its axis needs."""
    if not extents:
        return [()] if tile == 1 else []
    result = []
    side = 1
    while side <= min(tile, _longest(extents[0])):
        result += [(side, *rest) for rest in _shapes(tile // side, extents[1:])]
        side *= 2
    return result


def _longest(extent: int) -> int:
    """The side that holds a whole axis."""
    return 1 << max(extent - 1, 0).bit_length()


def _whole(tile: int, extents: Sequence[int]) -> tuple[int, ...]:
    """A brick that holds the grid and more: what is beyond is empty."""
    sides = [*map(_longest, extents)]
    return (*sides[:-1], tile // prod(sides[:-1]))


def _brick_work(part: _Segments, order: Order) -> TileWork:
    tables = [
        [(axis.visible(a, b), axis.area(a, b)) for axis, a, b in zip(p, order.q_brick, order.k_brick, strict=True)]
        for p in part.products
    ]
    visible = sum(prod(int(seen.sum()) for seen, _ in table) for table in tables)
    q_tile, k_tile = prod(order.q_brick), prod(order.k_brick)
    if len(tables) == 1:
        rows, columns = (_multiplied(tables[0], axis) for axis in (1, 0))
        return TileWork(order, q_tile, k_tile, rows, columns, visible)
    if prod(seen.size for seen, _ in tables[0]) > MOST_BRICKS:
        raise TooManyTilesError
    rows, columns = _united_products(tables)
    return TileWork(order, q_tile, k_tile, rows, columns, visible)


def _multiplied(table: Sequence[tuple[Int64, Int64]], axis: int) -> Strips:
    """Return the strips of one product: a brick is live where every axis is, and full where every axis is."""
    found: Strips | None = None
    for seen, area in table:
        own = strips((seen == area).sum(axis), ((seen > 0) & (seen < area)).sum(axis))
        if found is None:
            found = own
            continue
        full = np.multiply.outer(found.full, own.full).ravel()
        live = np.multiply.outer(found.full + found.partial, own.full + own.partial).ravel()
        found = strips(full, live - full, np.multiply.outer(found.times, own.times).ravel())
    assert found is not None
    return found


def _united_products(tables: Sequence[Sequence[tuple[Int64, Int64]]]) -> tuple[Strips, Strips]:
    """Return the strips of several products that share no pair: their visible pairs add up."""
    first = [seen.shape for seen, _ in tables[0]]
    rows, columns = (prod(shape[i] for shape in first) for i in (0, 1))
    inner_rows = rows // first[0][0]
    full_of, live_of = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    full_at, live_at = np.zeros(columns, dtype=np.int64), np.zeros(columns, dtype=np.int64)
    area_inner = reduce(np.kron, (area for _, area in tables[0][1:]), np.ones((1, 1), dtype=np.int64))
    inner = [reduce(np.kron, (seen for seen, _ in t[1:]), np.ones((1, 1), dtype=np.int64)) for t in tables]
    for i in range(first[0][0]):
        total = reduce(np.add, (np.kron(t[0][0][i : i + 1], rest) for t, rest in zip(tables, inner, strict=True)))
        area = np.kron(tables[0][0][1][i : i + 1], area_inner)
        full, live = total == area, total > 0
        at = slice(i * inner_rows, (i + 1) * inner_rows)
        full_of[at], live_of[at] = full.sum(1), live.sum(1)
        full_at += full.sum(0)
        live_at += live.sum(0)
    return strips(full_of, live_of - full_of), strips(full_at, live_at - full_at)
