"""The live tiles of a relation in an order of its tokens: as they stand, in bricks of a grid, in residue classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis import exact
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.analysis.separation import NotSeparableError, TokenGrid, grid_of, separate_axes
from attnc.compiler.analysis.tiles import Grid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index, Truth
from attnc.compiler.planning.grids import parts_of, reads_coordinates
from attnc.compiler.planning.residues import residues, split
from attnc.compiler.planning.runs import TooManyClassesError, resolve
from attnc.compiler.rewrite import substitute
from attnc.compiler.simulation.shifted_rows import RowCounts, count_shifted, find_repetition
from attnc.compiler.simulation.strips import Strips, strips, together
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

Int64 = NDArray[np.int64]
Origins = Mapping[Index, Span]

LONGEST_AXIS = 4096
"""Coordinates of an axis of a grid, whose pairs are looked at one by one."""

MOST_BRICKS = 1 << 26
"""Pairs of bricks that are looked at one by one, where a relation is several products."""


FEW, MANY = 1 << 16, 1 << 21
"""Undecided boxes that are looked into, in natural order: with another order at hand, and without."""

SOME, HUGE = 1 << 18, 1 << 24
"""Of a matrix with a huge number of tiles, without another order at hand: undecided boxes, and what is huge."""

LARGE_TILE, SAMPLES = 128, 32
"""The side of the square tiles that are sampled where they are too many to count, and the rows counted then."""

GOLDEN = 0.6180339887498949
"""Multiples of it fall evenly between 0 and 1, and on no grid."""

REPEATED = 1 << 16
"""Tiles of a matrix from which on rows that repeat are counted by a few of them."""


@dataclass(frozen=True, slots=True)
class Order:
    """How tokens stand in tiles. Bricks have a side for each axis; `divisors`: of the classes of residues."""

    kind: Literal["natural", "bricks", "residues"]
    q_brick: tuple[int, ...] = ()
    k_brick: tuple[int, ...] = ()
    divisors: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == "bricks":
            q, k = ("×".join(map(str, brick)) for brick in (self.q_brick, self.k_brick))
            return f"bricks of {q} queries and {k} keys"
        if self.kind == "residues":
            return f"classes of residues modulo {', '.join(map(str, self.divisors))}"
        return "natural order"


NATURAL = Order("natural")


@dataclass(frozen=True, eq=False)
class TileWork:
    """The live tiles of one relation: by rows as the forward walks them, by columns as the gradient of keys does.

    `visible`: pairs, None where they were not counted. `merged`: rows of the output that two walks write and a third
    has to join. `sampled`: of how many tile rows all of this was inferred, 0 where all were counted.
    """

    order: Order
    q_tile: int
    k_tile: int
    rows: Strips
    columns: Strips
    visible: int | None
    merged: int = 0
    sampled: int = 0

    def repeated(self, times: int) -> TileWork:
        """So many of it."""
        visible = None if self.visible is None else self.visible * times
        rows, columns = self.rows.repeated(times), self.columns.repeated(times)
        return replace(self, rows=rows, columns=columns, visible=visible, merged=self.merged * times)


def joined(parts: Sequence[TileWork], order: Order, q_tile: int, k_tile: int) -> TileWork:
    """Several works as one, walked side by side."""
    counts = [part.visible for part in parts]
    return TileWork(
        order,
        q_tile,
        k_tile,
        together(part.rows for part in parts),
        together(part.columns for part in parts),
        None if None in counts else sum(n for n in counts if n is not None),
        sum(part.merged for part in parts),
        max((part.sampled for part in parts), default=0),
    )


class TileFinder:
    """The tiles of a specialised relation over n_q rows and n_k keys, in every order that it has."""

    def __init__(self, relation: Index, n_q: int, n_k: int, origins: Origins) -> None:
        self._relation, self._n_q, self._n_k, self._origins = relation, n_q, n_k, origins
        self._natural: dict[tuple[int, int], TileWork] = {}
        self._classes: dict[object, TileFinder] = {}

    # --- as they stand

    def natural(self, q_tile: int, k_tile: int) -> TileWork:
        """Tiles of adjacent tokens. Raises TooManyTilesError, TooManyClassesError, EvaluationError.

        Where there are other orders, the tiles are counted only if they are few; where there is none, large tiles that
        are too many to count are counted in some rows, which stand for the others (`sampled`).
        """
        key = q_tile, k_tile
        if key not in self._natural:
            self._natural[key] = self._counted(Grid(self._n_q, self._n_k, q_tile, k_tile))
        return self._natural[key]

    def _counted(self, grid: Grid) -> TileWork:
        found = find_repetition(self._relation, grid) if grid.rows * grid.columns >= REPEATED else None
        if found is not None:
            return _work_of(grid, count_shifted(self._relation, grid, found, self._origins))
        alone = not (self.divisors or self.bricks)
        budget = FEW if not alone else SOME if grid.rows * grid.columns >= HUGE else MANY
        try:
            return _work_of(grid, _counts(self._relation, grid, self._origins, budget))
        except TooManyTilesError:
            if not alone or grid.q_tile != grid.k_tile or grid.q_tile < LARGE_TILE or grid.rows < 2 * SAMPLES:
                raise
            return _sampled(self._relation, grid, self._origins)

    # --- in classes of residues

    @cached_property
    def divisors(self) -> tuple[int, ...]:
        """Of the congruences of q - k in the relation."""
        parts = split(self._relation)
        return tuple(sorted({part.congruence.divisor for part in parts if part.congruence is not None}))

    def by_residues(self, q_tile: int, k_tile: int) -> TileWork:
        """Each class of residues in an order of its own, what has no congruence as it stands. Raises as `natural`."""
        parts = split(self._relation)
        found: list[TileWork] = []
        for part in parts:
            if part.congruence is None:
                found.append(self._of(part.relation, self._n_q, self._n_k).natural(q_tile, k_tile))
                continue
            alike: dict[tuple[Index, int, int], int] = {}
            for one in residues(part, self._n_q, self._n_k):
                key = one.relation, one.n_q, one.n_k
                alike[key] = alike.get(key, 0) + 1
            found += [self._of(*key).natural(q_tile, k_tile).repeated(times) for key, times in alike.items()]
        merged = self._n_q if len(parts) > 1 else 0
        return replace(joined(found, Order("residues", divisors=self.divisors), q_tile, k_tile), merged=merged)

    def _of(self, relation: Index, n_q: int, n_k: int) -> TileFinder:
        key = relation, n_q, n_k
        if key not in self._classes:
            self._classes[key] = TileFinder(relation, n_q, n_k, self._origins)
        return self._classes[key]

    # --- in bricks

    @cached_property
    def bricks(self) -> BrickFinder | None:
        """The relation by bricks of its grid; None where it reads none with more than one axis, or does not separate.

        Of several segments, each pair of them has a grid, or is taken as it stands.
        """
        if not reads_coordinates(self._relation) or not fits_word(self._relation, (0, self._n_q), (0, self._n_k)):
            return None
        parts: list[_Part] = []
        try:
            for part in parts_of(self._relation, self._n_q, self._n_k):
                grid = grid_of(part.relation, part.n_q) if part.n_q == part.n_k else None
                if grid is None or max(axis.extent for axis in grid) > LONGEST_AXIS:
                    parts.append(_Part(part.n_q, part.n_k, part.relation, None, ()))
                else:
                    axes = [tuple(map(_Axis, p, grid)) for p in _separated(part.relation, grid)]
                    parts.append(_Part(part.n_q, part.n_k, part.relation, grid, tuple(axes)))
        except (NotSeparableError, EvaluationError):
            return None
        if not any(part.grid is not None and len(part.grid) > 1 for part in parts):
            return None
        return BrickFinder(parts, self._of)


def _separated(relation: Index, grid: TokenGrid) -> list[tuple[Index, ...]]:
    return [(relation,)] if len(grid) == 1 else separate_axes(relation, grid)


# --- as they stand ---------------------------------------------------------------------------------------------------


def _work_of(grid: Grid, counts: RowCounts) -> TileWork:
    by_row, by_column = strips(*counts.by_row), strips(*counts.by_column)
    return TileWork(NATURAL, grid.q_tile, grid.k_tile, by_row, by_column, counts.visible)


def _sampled(relation: Index, grid: Grid, origins: Origins) -> TileWork:
    """The tiles of some rows, each of which stands for those around it; columns are of the mean.

    The rows are unevenly apart, so that none of the relation's own steps is met alone.
    """
    ends = np.linspace(0, grid.rows, SAMPLES + 1).astype(np.int64)
    at = ends[:-1] + (np.arange(SAMPLES) * GOLDEN % 1 * np.diff(ends)).astype(np.int64)
    place = fold.place("q")
    own = [
        _counts(
            substitute(relation, {place: fold.add(place, fold.const(row * grid.q_tile))}),
            replace(grid, n_q=min(grid.q_tile, grid.n_q - row * grid.q_tile)),
            origins,
            MANY,
        )
        for row in at.tolist()
    ]
    times = np.diff(ends)
    rows = [np.array([one.by_row[i][0] for one in own]) for i in (0, 1)]
    columns = [np.sum([one.by_column[i] * n for one, n in zip(own, times.tolist(), strict=True)], 0) for i in (0, 1)]
    counts = [one.visible for one in own]
    visible = None
    if None not in counts:
        visible = sum(n * int(times[i]) for i, n in enumerate(counts) if n is not None)
    work = TileWork(
        NATURAL, grid.q_tile, grid.k_tile, strips(rows[0], rows[1], times), strips(columns[0], columns[1]), visible
    )
    return replace(work, sampled=SAMPLES)


def _counts(relation: Index, grid: Grid, origins: Origins, budget: int) -> RowCounts:
    resolved = resolve(relation, find_live_tiles(relation, grid, budget), origins)
    tiles, whole = resolved.tiles, resolved.tiles.kind == 0
    row, column = [], []
    for which in (whole, ~whole):
        count = tiles.count[which]
        row.append(np.bincount(tiles.row[which], weights=count, minlength=grid.rows).astype(np.int64))
        column.append(_covered(tiles.column[which], count, grid.columns))
    return RowCounts((row[0], row[1]), (column[0], column[1]), resolved.visible)


def _covered(start: Int64, count: Int64, columns: int) -> Int64:
    """How many stretches hold each column."""
    begins, ends = (np.bincount(at, minlength=columns + 1) for at in (start, start + count))
    return np.cumsum(begins - ends)[:columns].astype(np.int64)


# --- bricks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows and keys of two segments; the products of its relation, or no grid."""

    n_q: int
    n_k: int
    relation: Index
    grid: TokenGrid | None
    products: tuple[tuple[_Axis, ...], ...]


class _Axis:
    """A relation along one axis: visible pairs of every brick, for bricks whose sides are powers of two."""

    def __init__(self, relation: Index, axis: object) -> None:
        extent: int = axis.extent  # type: ignore[attr-defined]
        self.extent = extent
        self.everything = isinstance(relation, Truth) and relation.value
        self._relation = relation
        self._visible: dict[tuple[int, int], Int64] = {}
        self._counts: dict[tuple[int, int], tuple[int, int]] = {}

    def visible(self, q_side: int, k_side: int) -> Int64:
        """Visible pairs of every pair of bricks."""
        key = q_side, k_side
        if key not in self._visible:
            if key == (1, 1):
                span = (0, self.extent)
                found = exact.mask(self._relation, span, span).astype(np.int64)
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
        if key not in self._counts:
            found = self.visible(q_side, k_side)
            self._counts[key] = int((found > 0).sum()), int((found == self.area(q_side, k_side)).sum())
        return self._counts[key][0]


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

    def __init__(self, parts: Sequence[_Part], natural: object) -> None:
        self._parts = parts
        self._natural = natural
        self._grid = max((p for p in parts if p.grid is not None), key=lambda p: p.n_q).grid
        assert self._grid is not None

    @property
    def axes(self) -> tuple[int, ...]:
        """The extents of the largest grid."""
        assert self._grid is not None
        return tuple(axis.extent for axis in self._grid)

    def shapes(self, tile: int) -> list[tuple[int, ...]]:
        """Every way to make a brick of so many tokens of sides that are powers of two."""
        return _shapes(tile, self.axes) or [_whole(tile, self.axes)]

    def best(self, q_tile: int, k_tile: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Shapes of bricks of queries and of keys, those with the fewest live pairs first.

        Of a relation of several products, the sum of theirs is what counts here.
        """
        main = max((p for p in self._parts if p.grid == self._grid), key=lambda p: p.n_q)
        ranked = []
        for q_brick in self.shapes(q_tile):
            for k_brick in self.shapes(k_tile):
                live = sum(
                    prod(axis.live(a, b) for axis, a, b in zip(product, q_brick, k_brick, strict=True))
                    for product in main.products
                )
                ranked.append((live, q_brick != k_brick, q_brick, k_brick))
        return [(q, k) for _, _, q, k in sorted(ranked)]

    def work(self, q_brick: tuple[int, ...], k_brick: tuple[int, ...]) -> TileWork:
        """The live bricks. Raises TooManyTilesError where there are too many to look at, and as `natural` does."""
        order = Order("bricks", q_brick, k_brick)
        q_tile, k_tile = prod(q_brick), prod(k_brick)
        found = []
        for part in self._parts:
            if part.grid == self._grid and part.products:
                found.append(_brick_work(part, order))
            elif part.grid is None or not part.products:
                if part.grid is None:
                    found.append(self._natural(part.relation, part.n_q, part.n_k).natural(q_tile, k_tile))  # type: ignore[operator]
            else:
                found.append(_other_grid(part, q_tile, k_tile))
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


def _other_grid(part: _Part, q_tile: int, k_tile: int) -> TileWork:
    """A part with a grid of its own, by its own best bricks."""
    finder = BrickFinder([part], None)
    return finder.work(*finder.best(q_tile, k_tile)[0])


def _brick_work(part: _Part, order: Order) -> TileWork:
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
    """Of one product: a brick is live where every axis is, and full where every axis is."""
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
    """Of several products, which share no pair: their visible pairs add up."""
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


__all__ = [
    "NATURAL",
    "BrickFinder",
    "Order",
    "TileFinder",
    "TileWork",
    "TooManyClassesError",
    "TooManyTilesError",
    "joined",
]
