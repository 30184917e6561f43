"""Count the live bricks of a relation over a grid of tokens, for bricks of every shape."""

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
from attnc.compiler.planning.tile_work import Int64, Order, Strips, TileWork, joined, strips
from attnc.spec.errors import EvaluationError

LONGEST_AXIS = 4096
"""Maximum number of coordinates of an axis, whose pairs are evaluated one by one."""

MOST_BRICKS = 1 << 26
"""Maximum number of pairs of bricks that are counted one by one, where a relation is several products."""


Natural = Callable[[Index, int, int, int, int], TileWork]
"""(relation, rows, keys, q tile, k tile) → the tiles of a pair of segments without a grid, in natural order."""


def find_bricks(relation: Index, n_q: int, n_k: int, natural: Natural) -> BrickFinder | None:
    """Return a finder of the bricks of a relation; None without a grid of several axes, or if it does not separate.

    A pair of segments without a grid is counted in natural order.
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
    """Return a pair of segments with its grid and products, or without a grid if its axes are too long."""
    grid = grid_of(relation, n_q) if n_q == n_k else None
    if grid is None or max(axis.extent for axis in grid) > LONGEST_AXIS:
        return _Segments(n_q, n_k, relation, None, ())
    products = [(relation,)] if len(grid) == 1 else separate_axes(relation, grid)
    return _Segments(n_q, n_k, relation, grid, tuple(tuple(map(_Axis, p, grid)) for p in products))


@dataclass(frozen=True, eq=False)
class _Segments:
    """A pair of segments; `products`: its relation as a union of products of axes, empty without a grid."""

    n_q: int
    n_k: int
    relation: Index
    grid: TokenGrid | None
    products: tuple[tuple[_Axis, ...], ...]


class _Axis:
    """A relation along one axis, with its visible pairs in bricks whose sides are powers of two."""

    def __init__(self, relation: Index, axis: SeparatedAxis) -> None:
        self.extent = axis.extent
        self._relation = relation
        self._visible: dict[tuple[int, int], Int64] = {}
        self._live: dict[tuple[int, int], int] = {}

    def visible(self, q_side: int, k_side: int) -> Int64:
        """Return the visible pairs of every pair of bricks: (q bricks, k bricks)."""
        key = q_side, k_side
        if key not in self._visible:
            if key == (1, 1):
                span = (0, self.extent)
                counts = exact_evaluation.mask(self._relation, span, span).astype(np.int64)
            elif q_side > 1:
                counts = _folded(self.visible(q_side // 2, k_side))
            else:
                counts = _folded(self.visible(q_side, k_side // 2).T).T
            self._visible[key] = counts
        return self._visible[key]

    def area(self, q_side: int, k_side: int) -> Int64:
        """Return the number of pairs in every pair of bricks: (q bricks, k bricks)."""
        heights, widths = (_sides(self.extent, side) for side in (q_side, k_side))
        return np.multiply.outer(heights, widths)

    def live(self, q_side: int, k_side: int) -> int:
        """Return the number of pairs of bricks with a visible pair."""
        key = q_side, k_side
        if key not in self._live:
            self._live[key] = int((self.visible(q_side, k_side) > 0).sum())
        return self._live[key]


def _folded(counts: Int64) -> Int64:
    """Return the sums of neighbouring pairs of rows."""
    if len(counts) % 2:
        counts = np.concatenate([counts, np.zeros((1, counts.shape[1]), dtype=np.int64)])
    return np.asarray(counts[0::2] + counts[1::2])


def _sides(extent: int, side: int) -> Int64:
    starts = np.arange(0, extent, side)
    return np.minimum(side, extent - starts)


class BrickFinder:
    """Finds and counts the live bricks of a relation for bricks of any shape."""

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
        """Return all shapes of bricks of `tile` tokens whose sides are powers of two."""
        return _shapes(tile, self.axes) or [_whole_grid(tile, self.axes)]

    def best(self, q_tile: int, k_tile: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return pairs of shapes (of queries, of keys), sorted by their number of live pairs of bricks.

        A relation of several products is ranked by the sum over its products.
        """
        ranked = []
        for q_brick in self.shapes(q_tile):
            for k_brick in self.shapes(k_tile):
                ranked.append((self.live(q_brick, k_brick), q_brick != k_brick, q_brick, k_brick))
        return [(q, k) for _, _, q, k in sorted(ranked)]

    def live(self, q_brick: tuple[int, ...], k_brick: tuple[int, ...]) -> int:
        """Return the live pairs of bricks; a pair that is live in several products counts once for each."""
        return sum(
            prod(axis.live(a, b) for axis, a, b in zip(product, q_brick, k_brick, strict=True))
            for product in self._main.products
        )

    def pairs(self, q_brick: tuple[int, ...], k_brick: tuple[int, ...]) -> tuple[Int64, Int64] | None:
        """Return the visible pairs and all pairs of every brick of queries (rows) with every brick of keys (columns).

        None if the tokens are more than one grid, or if there are too many bricks to count.
        """
        (first_part, *other_parts), products = self._parts, self._main.products
        if other_parts or first_part.grid is None:
            return None
        areas = [axis.area(a, b) for axis, a, b in zip(products[0], q_brick, k_brick, strict=True)]
        if prod(area.size for area in areas) > MOST_BRICKS:
            return None
        visible = [[x.visible(a, b) for x, a, b in zip(p, q_brick, k_brick, strict=True)] for p in products]
        return reduce(np.add, (reduce(np.kron, factors) for factors in visible)), reduce(np.kron, areas)

    def work(self, q_brick: tuple[int, ...], k_brick: tuple[int, ...]) -> TileWork:
        """Return the live bricks. Raises TooManyTilesError if they are too many to count, and as `natural` does."""
        order = Order("bricks", q_brick, k_brick)
        q_tile, k_tile = prod(q_brick), prod(k_brick)
        tile_works = []
        for part in self._parts:
            if part.grid is None:
                tile_works.append(self._natural(part.relation, part.n_q, part.n_k, q_tile, k_tile))
            elif part.products:
                brick_finder = BrickFinder([part], self._natural)
                same_grid = part.grid == self._main.grid
                tile_works.append(
                    _brick_work(part, order) if same_grid else brick_finder.work(*brick_finder.best(q_tile, k_tile)[0])
                )
        return joined(tile_works, order, q_tile, k_tile)


def _shapes(tile: int, extents: Sequence[int]) -> list[tuple[int, ...]]:
    """Return all tuples of sides whose product is `tile` and whose sides are no longer than their axes need."""
    if not extents:
        return [()] if tile == 1 else []
    result = []
    side = 1
    while side <= min(tile, _covering_side(extents[0])):
        result += [(side, *rest) for rest in _shapes(tile // side, extents[1:])]
        side *= 2
    return result


def _covering_side(extent: int) -> int:
    """Return the smallest power of two that holds a whole axis."""
    return 1 << max(extent - 1, 0).bit_length()


def _whole_grid(tile: int, extents: Sequence[int]) -> tuple[int, ...]:
    """Return a brick that holds the whole grid; tokens beyond the grid are empty."""
    sides = [*map(_covering_side, extents)]
    return (*sides[:-1], tile // prod(sides[:-1]))


def _brick_work(part: _Segments, order: Order) -> TileWork:
    """Return the live bricks of a pair of segments with a grid."""
    tables = [
        [(axis.visible(a, b), axis.area(a, b)) for axis, a, b in zip(p, order.q_brick, order.k_brick, strict=True)]
        for p in part.products
    ]
    visible = sum(prod(int(counts.sum()) for counts, _ in table) for table in tables)
    q_tile, k_tile = prod(order.q_brick), prod(order.k_brick)
    if len(tables) == 1:
        rows, columns = (_multiplied(tables[0], axis) for axis in (1, 0))
        return TileWork(order, q_tile, k_tile, rows, columns, visible)
    if prod(counts.size for counts, _ in tables[0]) > MOST_BRICKS:
        raise TooManyTilesError
    rows, columns = _united_products(tables)
    return TileWork(order, q_tile, k_tile, rows, columns, visible)


def _multiplied(table: Sequence[tuple[Int64, Int64]], axis: int) -> Strips:
    """Return the strips of a product: a brick is live or full if it is so on every axis."""
    product: Strips | None = None
    for counts, area in table:
        factor = strips((counts == area).sum(axis), ((counts > 0) & (counts < area)).sum(axis))
        if product is None:
            product = factor
            continue
        full = np.multiply.outer(product.full, factor.full).ravel()
        live = np.multiply.outer(product.full + product.partial, factor.full + factor.partial).ravel()
        product = strips(full, live - full, np.multiply.outer(product.times, factor.times).ravel())
    assert product is not None
    return product


def _united_products(tables: Sequence[Sequence[tuple[Int64, Int64]]]) -> tuple[Strips, Strips]:
    """Return the strips of several disjoint products, whose visible pairs add up."""
    first = [counts.shape for counts, _ in tables[0]]
    rows, columns = (prod(shape[i] for shape in first) for i in (0, 1))
    inner_rows = rows // first[0][0]
    full_by_row, live_by_row = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    full_by_column, live_by_column = np.zeros(columns, dtype=np.int64), np.zeros(columns, dtype=np.int64)
    area_inner = reduce(np.kron, (area for _, area in tables[0][1:]), np.ones((1, 1), dtype=np.int64))
    inner = [reduce(np.kron, (counts for counts, _ in table[1:]), np.ones((1, 1), dtype=np.int64)) for table in tables]
    for i in range(first[0][0]):
        total = reduce(
            np.add,
            (np.kron(table[0][0][i : i + 1], inner_table) for table, inner_table in zip(tables, inner, strict=True)),
        )
        area = np.kron(tables[0][0][1][i : i + 1], area_inner)
        full, live = total == area, total > 0
        block = slice(i * inner_rows, (i + 1) * inner_rows)
        full_by_row[block], live_by_row[block] = full.sum(1), live.sum(1)
        full_by_column += full.sum(0)
        live_by_column += live.sum(0)
    return strips(full_by_row, live_by_row - full_by_row), strips(full_by_column, live_by_column - full_by_column)
