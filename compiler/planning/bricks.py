"""Covers of relations over a grid of tokens: the product of one cover for each axis, whose tiles are bricks.

Each axis is covered like a sequence: from its exact matrix if that is small, else by interval analysis.
The product of the axes' pieces covers the product of their relations; its tiles are never enumerated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce as accumulate
from itertools import product
from math import inf, prod
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.separation import CoordinateLeaves, NotSeparableError, SeparatedAxis
from attnc.compiler.ir import Arith, Const, Index, Truth
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.planning.cpu_plan import GridMask, Mask, PlanPiece, Strip, StripAxis, stretch, strip
from attnc.compiler.planning.pieces import Cover
from attnc.compiler.planning.rates import ROWS, PieceWork, Rates
from attnc.compiler.planning.residues import split

Int64 = NDArray[np.int64]

LARGEST_TILE = 256
SMALLEST_BRICK, LARGEST_BRICK = 32, 1024
"""Minimum and maximum number of tokens of a brick of queries; a smaller grid has smaller bricks."""

GAP = 16
"""Minimum length of a gap of hidden keys at which pieces are split; the gap must also be a quarter of the stretch."""


Solve = Callable[[Index, int], tuple[Cover, int] | None]
"""(relation, extent) → the cover of a long axis by pieces with masks, and its tile size; None if none was found."""


class AxisTable:
    """One axis of a product with its covers by tile size.

    The relation of a short axis is held as exact matrices, one for each residue class; a longer axis is solved like a
    sequence.
    """

    def __init__(self, relation: Index, number: int, leaves: CoordinateLeaves, most_pairs: int, solve: Solve) -> None:
        self.axis = axis = leaves.grid[number]
        self._relation = relation
        self._trivial = isinstance(relation, Truth) and relation.value
        self._parts: tuple[_CoordinateMatrix, ...] = ()
        self._sums: TileSums | None = None
        self._covers: dict[int, Cover] = {}
        self._tiles: list[int] = []
        if self._trivial:
            return
        if axis.extent**2 > most_pairs:
            self._take_solved(solve(leaves.alone(relation, number), axis.extent))
        elif any(isinstance(node, Arith) and node.op == "mod" for node in walk(relation)):
            self._parts = tuple(_classes(leaves.alone(relation, number), axis.extent))
        else:
            matrix = exact_evaluation.mask_of_coordinates(relation, leaves.coordinates(number), axis.extent)
            self._parts = (_CoordinateMatrix(0, 0, 1, matrix, True),)

    def _take_solved(self, solved: tuple[Cover, int] | None) -> None:
        """Keep the cover of a long axis; raise NotSeparableError if there is none."""
        if solved is None:
            raise NotSeparableError
        self._covers[solved[1]] = solved[0]

    def tiles(self) -> list[int]:
        """Return the tile sizes to try: the whole axis, powers of two, and the relation's divisors."""
        if self._covers and not self._parts and not self._trivial:
            return list(self._covers)
        if not self._tiles:
            extent = self.axis.extent
            sizes = {1 << i for i in range(LARGEST_TILE.bit_length()) if 1 << i < extent}
            sizes |= {c for c in _divisors(self._relation) if c < extent}
            if self._trivial or extent <= LARGEST_TILE:
                sizes.add(extent)
            self._tiles = sorted(sizes)
        return self._tiles

    def sums(self) -> TileSums:
        """Return the sums over the tiles of the axis for each tile size."""
        if self._sums is None:
            tiles = self.tiles()
            self._sums = _sums(self._parts, tiles) if self._parts else _cover_sums([self.cover(tile) for tile in tiles])
        return self._sums

    def cover(self, tile: int) -> Cover:
        """Return the cover of the axis by tiles of one size, over its coordinates."""
        if tile not in self._covers:
            extent = self.axis.extent
            self._covers[tile] = _everything(extent, tile) if self._trivial else _matrix_cover(self._parts, tile)
        return self._covers[tile]


class _CoordinateMatrix:
    """The relation between coordinates `row + d·i` and `key + d·j`, as a matrix over i and j.

    `lone`: whether no other part of the relation sees the same rows.
    """

    def __init__(self, row: int, key: int, divisor: int, matrix: Mask, lone: bool) -> None:
        self.row, self.key, self.divisor, self.lone = row, key, divisor, lone
        self.matrix = matrix
        sees_any = matrix.any(axis=1)
        self._low = np.where(sees_any, matrix.argmax(axis=1), matrix.shape[1])
        self._high = np.where(sees_any, matrix.shape[1] - matrix[:, ::-1].argmax(axis=1), 0)

    def sums(self, tiles: Int64) -> TileSums:
        """Return sums over row tiles of each size; a tile has the keys from its first visible key to its last."""
        n, sizes = len(self.matrix), len(tiles)
        counts = -(-n // tiles)
        begins, size = np.cumsum(counts) - counts, np.repeat(np.arange(sizes), counts)
        starts = (np.arange(len(size)) - begins[size]) * tiles[size]
        heights = np.minimum(tiles[size], n - starts)
        first_rows = starts + n * size
        ends = np.maximum.reduceat(np.concatenate([self._high] * sizes), first_rows)
        firsts = np.minimum(np.minimum.reduceat(np.concatenate([self._low] * sizes), first_rows), ends)
        widths = ends - firsts
        live = widths > 0
        shape_codes = ((firsts - starts) * (2 * self.matrix.shape[1] + 1) + widths) * (n + 1) + heights
        shapes = np.bincount(_distinct(shape_codes[live] * sizes + size[live]) % sizes, minlength=sizes)
        elements, rows, keys = (np.add.reduceat(x, begins) for x in (heights * widths, heights * live, widths))
        return TileSums(elements, rows, keys, shapes, np.maximum.reduceat(widths, begins))


@dataclass(frozen=True, slots=True)
class TileSums:
    """Sums over the tiles of an axis, as arrays with one entry for each tile size.

    `elements`: score elements. `rows`, `keys`: rows and keys of all tiles. `shapes`: distinct shapes of tiles.
    `width`: the maximum number of keys of a tile.
    """

    elements: Int64
    rows: Int64
    keys: Int64
    shapes: Int64
    width: Int64

    def __add__(self, other: TileSums) -> TileSums:
        """Add the sums of two parts of a relation."""
        return TileSums(
            self.elements + other.elements,
            self.rows + other.rows,
            self.keys + other.keys,
            self.shapes + other.shapes,
            np.maximum(self.width, other.width),
        )


def _distinct(values: Int64) -> Int64:
    """Return the distinct values in order; `np.unique` takes several times as long for few values."""
    values = np.sort(values)
    return np.append(values[:-1][values[1:] != values[:-1]], values[-1:])


def _everything(extent: int, tile: int) -> Cover:
    """Return the cover of an axis on which every row sees all keys."""
    count, tail = divmod(extent, tile)
    pieces = [PlanPiece(strip(0, tile, count, tile), strip(0, 0, count, extent), "full")]
    if tail:
        pieces.append(PlanPiece(stretch(extent - tail, extent), stretch(0, extent), "full"))
    return Cover(tuple(pieces), (), (-(-extent // tile)) ** 2, 0, extent**2)


def _cover_sums(covers: Sequence[Cover]) -> TileSums:
    """Return the tile sums of covers, each with its own tile size."""
    sums = []
    for axis_cover in covers:
        sizes = [(piece.queries.count, piece.queries.length, piece.keys.length) for piece in axis_cover.pieces]
        elements = sum(count * rows * keys for count, rows, keys in sizes)
        rows, keys = (sum(size[0] * size[i] for size in sizes) for i in (1, 2))
        sums.append((elements, rows, keys, len(sizes), max((keys for _, _, keys in sizes), default=0)))
    elements, rows, keys, shapes, width = np.array(sums, dtype=np.int64).T
    return TileSums(elements, rows, keys, shapes, width)


def _classes(relation: Index, extent: int) -> Iterable[_CoordinateMatrix]:
    """Yield the relation as matrices, one for each residue class of its congruences and one for the rest."""
    parts = split(relation)
    for part in parts:
        matrix = exact_evaluation.mask(part.relation, (0, extent), (0, extent))
        if part.congruence is None:
            yield _CoordinateMatrix(0, 0, 1, matrix, len(parts) == 1)
            continue
        d = part.congruence.divisor
        for row in range(min(d, extent)):
            key = (row - part.congruence.offset) % d
            if key < extent:
                yield _CoordinateMatrix(row, key, d, matrix[row::d, key::d], len(parts) == 1)


def _divisors(relation: Index) -> set[int]:
    """Return the constants up to LARGEST_TILE by which the relation divides."""
    return {
        node.operands[1].value
        for node in walk(relation)
        if isinstance(node, Arith) and node.op in ("floordiv", "mod")
        if isinstance(node.operands[1], Const) and 1 < node.operands[1].value <= LARGEST_TILE
    }


# --- one axis --------------------------------------------------------------------------------------------------------


def _sums(parts: Sequence[_CoordinateMatrix], tiles: Sequence[int]) -> TileSums:
    """Return the tile sums of the matrices of an axis for each tile size."""
    return accumulate(TileSums.__add__, (part.sums(np.array(tiles)) for part in parts if part.matrix.size))


def _matrix_cover(parts: Sequence[_CoordinateMatrix], tile: int) -> Cover:
    """Return the cover of an axis by row tiles of one size, from the matrices of its residue classes."""
    runs: list[_RowRun] = []
    masks: list[GridMask] = []
    mask_numbers: dict[tuple[tuple[int, int], bytes], int] = {}
    full = live = 0
    for part in parts:
        if not part.matrix.size:
            continue
        rows = _RowsOfTiles.of(part.matrix, tile)
        part_full, part_live = rows.counts(tile)
        full, live = full + part_full, live + part_live
        d = part.divisor
        for row, height, key, width, mask, fresh in rows.runs():
            index: Literal["full"] | int = "full"
            if mask is not None:
                index = mask_numbers.setdefault((mask.shape, mask.tobytes()), len(masks))
                if index == len(masks):
                    masks.append(GridMask((mask,)))
            kind = (height, width, d, index, fresh and part.lone)
            runs.append(_RowRun(part.row + row * d, part.key + key * d, kind))
    visible = sum(int(np.count_nonzero(part.matrix)) for part in parts)
    return Cover(tuple(_joined(runs)), tuple(masks), full, live - full, visible)


class _RowRun(NamedTuple):
    """A stretch of rows that sees a stretch of keys.

    `kind`: both lengths, the stride, the mask, and whether no earlier run has written the rows.
    """

    row: int
    key: int
    kind: tuple[int, int, int, Literal["full"] | int, bool]


def _joined(runs: list[_RowRun]) -> Iterator[PlanPiece]:
    """Yield pieces of runs: fresh runs first, equal runs at even steps as one piece, in the order of `join_pieces`."""
    runs.sort(key=lambda run: not run.kind[4])
    begin = 0
    while begin < len(runs):
        first, count = runs[begin], _even_steps(runs, begin)
        height, width, d, mask, fresh = first.kind
        q_step, k_step = (runs[begin + 1].row - first.row, runs[begin + 1].key - first.key) if count > 1 else (0, 0)
        queries, keys = strip(first.row, q_step, count, height, d), strip(first.key, k_step, count, width, d)
        yield PlanPiece(queries, keys, mask, fresh)
        begin += count


def _even_steps(runs: list[_RowRun], begin: int) -> int:
    """Return the number of runs from index `begin` on that are equal and evenly spaced in rows and in keys."""
    row, key, kind = runs[begin]
    if begin + 1 == len(runs):
        return 1
    q_step, k_step = runs[begin + 1].row - row, runs[begin + 1].key - key
    if q_step < 0 or k_step < 0:
        return 1
    height, _, d, _, _ = kind
    stop = begin + 1
    while stop < len(runs) and runs[stop] == (row + q_step, key + k_step, kind):
        if q_step < height * d and not StripAxis(q_step, stop - begin + 1, height, d).apart:
            break
        row, key, stop = row + q_step, key + k_step, stop + 1
    return stop - begin


_SOME_AND_EVERY = ((np.logical_or, False), (np.logical_and, True))
"""Reductions and their neutral elements: whether some row, and whether every row, sees a key."""


@dataclass(frozen=True, slots=True)
class _RowsOfTiles:
    """A matrix cut into rows of tiles.

    `starts`: the first row of each tile row. `some`, `every` (tile row, key): whether some row, or every row, of the
    tile row sees the key.
    """

    matrix: Mask
    starts: Int64
    some: Mask
    every: Mask

    @classmethod
    def of(cls, matrix: Mask, tile: int) -> _RowsOfTiles:
        """Return the matrix cut into tile rows of height `tile`."""
        starts = np.arange(0, len(matrix), tile)
        some, every = (f.reduce(_filled(matrix, tile, v), axis=1) for f, v in _SOME_AND_EVERY)
        return cls(matrix, starts, some, every)

    def counts(self, tile: int) -> tuple[int, int]:
        """Return the numbers of full and of live tiles, each `tile` keys wide."""
        keys = np.arange(0, self.matrix.shape[1], tile)
        full = int(np.count_nonzero(np.logical_and.reduceat(self.every, keys, axis=1)))
        return full, int(np.count_nonzero(np.logical_or.reduceat(self.some, keys, axis=1)))

    def runs(self) -> Iterable[tuple[int, int, int, int, Mask | None, bool]]:
        """Yield the visible stretches of keys of every tile row.

        Each is (first row, rows, first key, keys, mask, fresh): the mask is None if all pairs are visible, `fresh`
        marks the first stretch of a tile row.
        """
        seen_count, common_count = self.some.sum(axis=1), self.every.sum(axis=1)
        first, last = self.some.argmax(axis=1), self.some.shape[1] - self.some[:, ::-1].argmax(axis=1)
        ends = np.append(self.starts[1:], len(self.matrix))
        tile_rows = zip(*(x.tolist() for x in (self.starts, ends, seen_count, common_count, first, last)), strict=True)
        for i, (start, stop, visible, by_all, low, high) in enumerate(tile_rows):
            if not visible:
                continue
            fresh = True
            is_contiguous = visible == high - low
            for left, right in [(low, high)] if is_contiguous else _stretches(np.flatnonzero(self.some[i])):
                full = by_all == visible if is_contiguous else bool(self.every[i, left:right].all())
                mask = None if full else np.ascontiguousarray(self.matrix[start:stop, left:right])
                yield start, stop - start, left, right - left, mask, fresh
                fresh = False


def _filled(matrix: Mask, tile: int, value: bool) -> Mask:
    """Return the rows by tiles, the last tile padded with `value`: (tiles, rows of a tile, keys)."""
    count = -(-len(matrix) // tile)
    missing = count * tile - len(matrix)
    if missing:
        matrix = np.concatenate([matrix, np.full((missing, matrix.shape[1]), value)])
    return matrix.reshape(count, tile, -1)


def _stretches(keys: Int64) -> list[tuple[int, int]]:
    """Return the half-open stretches of visible keys; small gaps stay inside a stretch."""
    gaps = np.diff(keys) - 1
    wide = gaps >= max(GAP, (int(keys[-1]) - int(keys[0])) // 4)
    cuts = np.flatnonzero(wide)
    lows = [int(keys[0]), *keys[cuts + 1].tolist()]
    highs = [*(keys[cuts] + 1).tolist(), int(keys[-1]) + 1]
    return list(zip(lows, highs, strict=True))


# --- all axes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bricks:
    """A cover of a product of axes by bricks; `tiles`: the brick's tokens along each axis.

    `total`: tiles of dense attention. `cost`: the estimated nanoseconds.
    """

    cover: Cover
    tiles: tuple[int, ...]
    total: int
    cost: float


def choose_bricks(tables: Sequence[AxisTable], rates: Rates, work: PieceWork, rank: int = 0) -> Bricks | None:
    """Return the cover of the product of the axes' relations by bricks; `rank`: which bricks, 0 for the cheapest.

    With fewer shapes than that, the last one is taken. None if no pair is visible.
    """
    size = prod(table.axis.extent for table in tables)
    if any(not table.sums().elements.any() for table in tables):
        return None
    cost, tiles = _cheapest(tables, min(size, SMALLEST_BRICK), rates, work, rank + 1)[-1]
    covers = [table.cover(tile) for table, tile in zip(tables, tiles, strict=True)]
    total = prod((-(-t.axis.extent // tile)) ** 2 for t, tile in zip(tables, tiles, strict=True))
    return Bricks(_multiplied(covers, [table.axis for table in tables]), tiles, total, cost)


def _cheapest(
    tables: Sequence[AxisTable], least: int, rates: Rates, work: PieceWork, count: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Return the cost and the tile of each axis of at most `count` shapes of bricks, the cheapest first.

    `least`: the minimum number of tokens of a brick.
    """
    choices = [table.tiles() for table in tables]
    sums = [table.sums() for table in tables]

    by_axis = (
        np.array([c, s.shapes, s.elements, s.width, s.rows, s.keys], dtype=np.float64)
        for c, s in zip(choices, sums, strict=True)
    )
    tokens, shapes, elements, width, rows, keys = accumulate(_outer, by_axis)
    by_rows = np.array([rates.element(work.dtype, count, work.head_dim) for count in ROWS])
    rate = by_rows[np.maximum(np.searchsorted(ROWS, tokens, side="right") - 1, 0)]
    time = elements * rate * work.lanes
    time *= rates.masked.get(work.dtype, rates.masked["float32"])
    time += shapes * rates.call + width * tokens * shapes * rates.mask
    with_copies = time + 2 * (rows + keys) * work.head_dim * work.lanes * rates.copy
    fits = (tokens >= least) & (tokens <= LARGEST_BRICK)
    best: list[tuple[float, tuple[int, ...]]] = []
    allowed = np.flatnonzero(fits if fits.any() else tokens > 0)
    for i in allowed[np.argsort(time[allowed], kind="stable")].tolist():
        if len(best) == count and time[i] >= best[-1][0]:
            break
        indices = np.unravel_index(i, [len(c) for c in choices])
        tiles = tuple(c[j] for c, j in zip(choices, indices, strict=True))
        widths = [int(s.width[j]) for s, j in zip(sums, indices, strict=True)]
        cost = time[i] if _is_view(tables, tiles, widths) else with_copies[i]
        best = sorted([*best, (float(cost), tiles)], key=lambda candidate: candidate[0])[:count]
    return best or [(inf, tuple(c[0] for c in choices))]


def _outer(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the products of all pairs of entries for each row, the entries of `b` fastest."""
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


def _is_view(tables: Sequence[AxisTable], tiles: Sequence[int], widths: Sequence[int]) -> bool:
    """Whether stretches of queries and keys in the middle of the grid are evenly spaced, so that views suffice."""
    cut = any(1 < width < table.axis.extent for width, table in zip(widths[1:], tables[1:], strict=True))
    if cut and sum(width > 1 for width in widths) > 1:
        return False
    for lengths in (tiles, widths):
        axes = (
            StripAxis(tile * t.axis.stride, -(-t.axis.extent // tile), length, t.axis.stride)
            for t, tile, length in zip(tables, tiles, lengths, strict=True)
        )
        if Strip(0, tuple(axes)).flat() is None:
            return False
    return True


def _multiplied(covers: Sequence[Cover], axes: Sequence[SeparatedAxis]) -> Cover:
    """Return the product of the covers of all axes, with pieces that write rows first."""
    factors = [[_Factor.of(p, c, axis) for p in c.pieces] for c, axis in zip(covers, axes, strict=True)]
    masks: dict[tuple[int, ...], int] = {}
    grid_masks: list[GridMask] = []
    pieces = []
    for parts in product(*factors):
        mask: Literal["full"] | int = "full"
        row, key, rows, keys, factor, hides, fresh = zip(*parts, strict=True)
        if any(hides):
            mask = masks.setdefault(tuple(map(id, factor)), len(grid_masks))
            if mask == len(grid_masks):
                grid_masks.append(GridMask(factor))
        pieces.append(PlanPiece(Strip(sum(row), rows), Strip(sum(key), keys), mask, all(fresh)))
    full = prod(c.full_tiles for c in covers)
    live = prod(c.full_tiles + c.partial_tiles for c in covers)
    visible = prod(c.visible or 0 for c in covers)
    return Cover(tuple(sorted(pieces, key=lambda p: not p.fresh)), tuple(grid_masks), full, live - full, visible)


class _Factor(NamedTuple):
    """A piece of one axis, measured in tokens of the grid; `hides`: whether the mask hides a pair."""

    row: int
    key: int
    rows: StripAxis
    keys: StripAxis
    mask: Mask
    hides: bool
    fresh: bool

    @classmethod
    def of(cls, piece: PlanPiece, axis_cover: Cover, axis: SeparatedAxis) -> _Factor:
        """Return a piece of an axis' cover, scaled from coordinates to tokens."""
        (rows,), (keys,) = piece.queries.axes, piece.keys.axes
        d = axis.stride
        return cls(
            piece.queries.start * d,
            piece.keys.start * d,
            StripAxis(rows.step * d, rows.count, rows.length, rows.stride * d),
            StripAxis(keys.step * d, keys.count, keys.length, keys.stride * d),
            _matrix(piece, axis_cover),
            piece.mask != "full",
            piece.fresh,
        )


def _matrix(piece: PlanPiece, axis_cover: Cover) -> Mask:
    """Return the mask of a piece as a matrix (rows, keys)."""
    if isinstance(piece.mask, int):
        return axis_cover.masks[piece.mask].factors[0]
    shape = piece.queries.length, piece.keys.length
    return np.tri(*shape, dtype=np.bool_) if piece.mask == "causal" else np.ones(shape, dtype=np.bool_)
