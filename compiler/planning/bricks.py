"""Covers of relations over a grid of tokens: an axis each, multiplied, so that a tile is a brick of the grid.

Each axis is covered like a sequence of its own, from its exact matrix where that is small, else by interval analysis.
The product of the axes' pieces covers the product of their relations; it is never written out by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce as accumulate
from itertools import product
from math import prod
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact
from attnc.compiler.analysis.separation import Axis, Leaves, NotSeparableError
from attnc.compiler.ir import Arith, Const, Index, Truth
from attnc.compiler.planning.pieces import Cover, join_pieces
from attnc.compiler.planning.plan import GridMask, Mask, Piece, Steps, Strip, stretch, strip
from attnc.compiler.planning.rates import ROWS, Rates, Work
from attnc.compiler.planning.residues import split
from attnc.compiler.rewrite import walk

LARGEST_TILE = 256
SMALLEST_BRICK, LARGEST_BRICK = 32, 1024
"""Tokens of a brick of queries, where the grid has as many."""

GAP = 16
"""Hidden keys between visible ones that are worth a piece of their own, if they are a quarter of the stretch."""


Solve = Callable[[Index, int], tuple[Cover, int] | None]
"""(relation, extent) → a cover of one long axis by pieces with masks, and its tile; None where there is none."""


class AxisTable:
    """One axis of a product, and its covers.

    A short axis is known by exact matrices, one for each class of residues that its relation falls into; a longer one
    is solved like a sequence.
    """

    def __init__(self, relation: Index, number: int, leaves: Leaves, most_pairs: int, solve: Solve) -> None:
        self.axis = axis = leaves.grid[number]
        self._relation = relation
        self._trivial = isinstance(relation, Truth) and relation.value
        self._parts: tuple[_Part, ...] = ()
        self._sums: dict[int, Sums] = {}
        self._covers: dict[int, Cover] = {}
        if self._trivial:
            return
        if axis.extent**2 > most_pairs:
            self._take(solve(leaves.alone(relation, number), axis.extent))
        elif any(isinstance(node, Arith) and node.op == "mod" for node in walk(relation)):
            self._parts = tuple(_classes(leaves.alone(relation, number), axis.extent))
        else:
            matrix = exact.mask_of_coordinates(relation, leaves.coordinates(number), axis.extent)
            self._parts = (_Part(0, 0, 1, matrix, True),)

    def _take(self, solved: tuple[Cover, int] | None) -> None:
        if solved is None:
            raise NotSeparableError
        self._covers[solved[1]] = solved[0]

    def tiles(self) -> list[int]:
        """Tile sizes to try: the axis whole, powers of two, and what the relation divides by."""
        if self._covers and not self._parts and not self._trivial:
            return list(self._covers)
        extent = self.axis.extent
        sizes = {1 << i for i in range(LARGEST_TILE.bit_length()) if 1 << i < extent}
        sizes |= {c for c in _divisors(self._relation) if c < extent}
        if self._trivial or extent <= LARGEST_TILE:
            sizes.add(extent)
        return sorted(sizes)

    def sums(self, tile: int) -> Sums:
        """What the cover with this tile comes to."""
        if tile not in self._sums:
            self._sums[tile] = _sums(self._parts, tile) if self._parts else _sums_of(self.cover(tile))
        return self._sums[tile]

    def cover(self, tile: int) -> Cover:
        """Pieces over the coordinates of the axis."""
        if tile not in self._covers:
            extent = self.axis.extent
            self._covers[tile] = _everything(extent, tile) if self._trivial else _axis_cover(self._parts, tile)
        return self._covers[tile]


class _Part:
    """The relation between coordinates `row + d·i` and `key + d·j`, as a matrix over i and j.

    `lone`: there is no other part that may see the same rows.
    """

    def __init__(self, row: int, key: int, divisor: int, matrix: Mask, lone: bool) -> None:
        self.row, self.key, self.divisor, self.lone = row, key, divisor, lone
        self.matrix = matrix
        seen = matrix.any(axis=1)
        self._low = np.where(seen, matrix.argmax(axis=1), matrix.shape[1])
        self._high = np.where(seen, matrix.shape[1] - matrix[:, ::-1].argmax(axis=1), 0)

    def reach(self, tile: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """For each tile of rows its height, first visible key and the end of its visible keys."""
        starts = np.arange(0, len(self.matrix), tile)
        heights = np.minimum(starts + tile, len(self.matrix)) - starts
        end = np.maximum.reduceat(self._high, starts)
        return heights, np.minimum(np.minimum.reduceat(self._low, starts), end), end


@dataclass(frozen=True, slots=True)
class Sums:
    """Over the tiles of an axis: score elements, rows, keys, and distinct shapes of tiles; `width`, the most keys."""

    elements: int
    rows: int
    keys: int
    shapes: int
    width: int


def _everything(extent: int, tile: int) -> Cover:
    """All keys for every row."""
    count, tail = divmod(extent, tile)
    pieces = [Piece(strip(0, tile, count, tile), strip(0, 0, count, extent), "full")]
    if tail:
        pieces.append(Piece(stretch(extent - tail, extent), stretch(0, extent), "full"))
    return Cover(tuple(pieces), (), (-(-extent // tile)) ** 2, 0, extent**2)


def _sums_of(found: Cover) -> Sums:
    sizes = [(p.queries.count, p.queries.length, p.keys.length) for p in found.pieces]
    return Sums(
        sum(count * rows * keys for count, rows, keys in sizes),
        sum(count * rows for count, rows, _ in sizes),
        sum(count * keys for count, _, keys in sizes),
        len(sizes),
        max((keys for _, _, keys in sizes), default=0),
    )


def _classes(relation: Index, extent: int) -> Iterable[_Part]:
    """The relation by classes of residues, where it has any."""
    parts = split(relation)
    for part in parts:
        matrix = exact.mask(part.relation, (0, extent), (0, extent))
        if part.congruence is None:
            yield _Part(0, 0, 1, matrix, len(parts) == 1)
            continue
        d = part.congruence.divisor
        for row in range(min(d, extent)):
            key = (row - part.congruence.offset) % d
            if key < extent:
                yield _Part(row, key, d, matrix[row::d, key::d], len(parts) == 1)


def _divisors(relation: Index) -> set[int]:
    """Constants that the relation divides by, and that its terms are multiples of."""
    return {
        node.operands[1].value
        for node in walk(relation)
        if isinstance(node, Arith) and node.op in ("floordiv", "mod")
        if isinstance(node.operands[1], Const) and 1 < node.operands[1].value <= LARGEST_TILE
    }


# --- one axis --------------------------------------------------------------------------------------------------------


def _sums(parts: Sequence[_Part], tile: int) -> Sums:
    elements = rows = keys = shapes = width = 0
    for part in parts:
        if not part.matrix.size:
            continue
        heights, first, end = part.reach(tile)
        widths = end - first
        live = widths > 0
        elements += int((heights * widths).sum())
        rows += int(heights[live].sum())
        keys += int(widths.sum())
        moved = first - np.arange(len(first)) * tile
        form = ((moved * (2 * part.matrix.shape[1] + 1)) + widths) * (tile + 1) + heights
        shapes += len(set(form[live].tolist()))
        width = max(width, int(widths.max(initial=0)))
    return Sums(elements, rows, keys, shapes, width)


def _axis_cover(parts: Sequence[_Part], tile: int) -> Cover:
    pieces: list[Piece] = []
    masks: list[GridMask] = []
    known: dict[tuple[tuple[int, int], bytes], int] = {}
    full = partial = 0
    for part in parts:
        if not part.matrix.size:
            continue
        full_here, partial_here = _tile_counts(part.matrix, tile)
        full, partial = full + full_here, partial + partial_here
        for piece, mask in _runs(part.matrix, tile):
            index = piece.mask
            if mask is not None:
                key = (mask.shape, mask.tobytes())
                index = known.setdefault(key, len(masks))
                if index == len(masks):
                    masks.append(GridMask((mask,)))
            pieces.append(_spread(Piece(piece.queries, piece.keys, index, piece.fresh and part.lone), part))
    visible = sum(int(part.matrix.sum()) for part in parts)
    return Cover(join_pieces(pieces), tuple(masks), full, partial, visible)


def _spread(piece: Piece, part: _Part) -> Piece:
    d = part.divisor
    if d == 1:
        return piece
    strips = []
    for one, first in ((piece.queries, part.row), (piece.keys, part.key)):
        axis = one.axes[0]
        strips.append(strip(first + one.start * d, axis.step * d, axis.count, axis.length, axis.stride * d))
    return Piece(strips[0], strips[1], piece.mask, piece.fresh)


def _runs(matrix: Mask, tile: int) -> Iterable[tuple[Piece, Mask | None]]:
    """The visible stretches of every tile of rows, each with its mask where it hides something."""
    for start in range(0, len(matrix), tile):
        rows = matrix[start : start + tile]
        fresh = True
        for low, high in _stretches(np.flatnonzero(rows.any(axis=0))):
            mask = rows[:, low:high]
            whole = bool(mask.all())
            yield (
                Piece(stretch(start, start + len(rows)), stretch(low, high), "full", fresh),
                None if whole else np.ascontiguousarray(mask),
            )
            fresh = False


def _stretches(seen: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Visible keys as stretches; small gaps stay inside."""
    if not len(seen):
        return []
    gaps = np.diff(seen) - 1
    wide = gaps >= max(GAP, (int(seen[-1]) - int(seen[0])) // 4)
    cuts = np.flatnonzero(wide)
    lows = [int(seen[0]), *seen[cuts + 1].tolist()]
    highs = [*(seen[cuts] + 1).tolist(), int(seen[-1]) + 1]
    return list(zip(lows, highs, strict=True))


def _tile_counts(matrix: Mask, tile: int) -> tuple[int, int]:
    """Full and partial tiles, `tile` a side."""
    rows, keys = (np.arange(0, n, tile) for n in matrix.shape)
    counts = np.add.reduceat(np.add.reduceat(matrix, rows, axis=0, dtype=np.int64), keys, axis=1)
    heights, widths = np.diff(np.append(rows, matrix.shape[0])), np.diff(np.append(keys, matrix.shape[1]))
    full = int((counts == np.outer(heights, widths)).sum())
    return full, int((counts > 0).sum()) - full


# --- all axes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bricks:
    """A product of axes, covered with bricks of `tiles` tokens."""

    cover: Cover
    tiles: tuple[int, ...]
    total: int
    cost: float


def choose_bricks(tables: Sequence[AxisTable], rates: Rates, work: Work) -> Bricks | None:
    """The product of the axes' relations with the bricks that the cost model likes best; None where it is empty."""
    size = prod(table.axis.extent for table in tables)
    if any(not table.sums(table.tiles()[0]).elements for table in tables):
        return None
    tiles, cost = _cheapest(tables, min(size, SMALLEST_BRICK), rates, work)
    covers = [table.cover(tile) for table, tile in zip(tables, tiles, strict=True)]
    total = prod((-(-t.axis.extent // tile)) ** 2 for t, tile in zip(tables, tiles, strict=True))
    return Bricks(_multiplied(covers, [table.axis for table in tables]), tiles, total, cost)


def _cheapest(tables: Sequence[AxisTable], least: int, rates: Rates, work: Work) -> tuple[tuple[int, ...], float]:
    """The tile of each axis, and the time."""
    choices = [table.tiles() for table in tables]
    sums = [[table.sums(tile) for tile in tiles] for table, tiles in zip(tables, choices, strict=True)]

    def over_all(values: list[list[int]]) -> NDArray[np.float64]:
        return accumulate(np.multiply.outer, (np.array(v, dtype=np.float64) for v in values)).ravel()

    tokens, shapes = over_all(choices), over_all([[s.shapes for s in one] for one in sums])
    by_rows = np.array([rates.element(work.dtype, rows, work.head_dim) for rows in ROWS])
    rate = by_rows[np.maximum(np.searchsorted(ROWS, tokens, side="right") - 1, 0)]
    time = over_all([[s.elements for s in one] for one in sums]) * rate * work.lanes
    time *= rates.masked.get(work.dtype, rates.masked["float32"])
    time += shapes * rates.call + over_all([[s.width for s in one] for one in sums]) * tokens * shapes * rates.mask
    copied = over_all([[s.rows for s in one] for one in sums]) + over_all([[s.keys for s in one] for one in sums])
    with_copies = time + 2 * copied * work.head_dim * work.lanes * rates.copy
    fit = (tokens >= least) & (tokens <= LARGEST_BRICK)
    best, chosen = float("inf"), tuple(c[0] for c in choices)
    allowed = np.flatnonzero(fit if fit.any() else tokens > 0)
    for i in allowed[np.argsort(time[allowed], kind="stable")].tolist():
        if time[i] >= best:
            break
        at = np.unravel_index(i, [len(c) for c in choices])
        tiles = tuple(c[j] for c, j in zip(choices, at, strict=True))
        widths = [one[j].width for one, j in zip(sums, at, strict=True)]
        cost = time[i] if _is_view(tables, tiles, widths) else with_copies[i]
        if cost < best:
            best, chosen = float(cost), tiles
    return chosen, best


def _is_view(tables: Sequence[AxisTable], tiles: Sequence[int], widths: Sequence[int]) -> bool:
    """Whether stretches of queries and keys in the middle of the grid lie evenly in memory."""
    cut = any(1 < width < table.axis.extent for width, table in zip(widths[1:], tables[1:], strict=True))
    if cut and sum(width > 1 for width in widths) > 1:
        return False
    for lengths in (tiles, widths):
        axes = (
            Steps(tile * t.axis.stride, -(-t.axis.extent // tile), length, t.axis.stride)
            for t, tile, length in zip(tables, tiles, lengths, strict=True)
        )
        if Strip(0, tuple(axes)).flat() is None:
            return False
    return True


def _multiplied(covers: Sequence[Cover], axes: Sequence[Axis]) -> Cover:
    factors = [[_Factor.of(p, c, axis) for p in c.pieces] for c, axis in zip(covers, axes, strict=True)]
    masks: dict[tuple[int, ...], int] = {}
    grid_masks: list[GridMask] = []
    pieces = []
    for parts in product(*factors):
        mask: Literal["full"] | int = "full"
        if any(part.hides for part in parts):
            key = tuple([id(part.mask) for part in parts])
            mask = masks.setdefault(key, len(grid_masks))
            if mask == len(grid_masks):
                grid_masks.append(GridMask(tuple([part.mask for part in parts])))
        queries = Strip(sum([part.row for part in parts]), tuple([part.rows for part in parts]))
        keys = Strip(sum([part.key for part in parts]), tuple([part.keys for part in parts]))
        pieces.append(Piece(queries, keys, mask, all(part.fresh for part in parts)))
    full = prod(c.full_tiles for c in covers)
    live = prod(c.full_tiles + c.partial_tiles for c in covers)
    visible = prod(c.visible or 0 for c in covers)
    return Cover(tuple(sorted(pieces, key=lambda p: not p.fresh)), tuple(grid_masks), full, live - full, visible)


class _Factor(NamedTuple):
    """A piece of one axis, in tokens of the grid."""

    row: int
    key: int
    rows: Steps
    keys: Steps
    mask: Mask
    hides: bool
    fresh: bool

    @classmethod
    def of(cls, piece: Piece, found: Cover, axis: Axis) -> _Factor:
        """A piece of an axis' cover."""
        (rows,), (keys,) = piece.queries.axes, piece.keys.axes
        d = axis.stride
        return cls(
            piece.queries.start * d,
            piece.keys.start * d,
            Steps(rows.step * d, rows.count, rows.length, rows.stride * d),
            Steps(keys.step * d, keys.count, keys.length, keys.stride * d),
            _matrix(piece, found),
            piece.mask != "full",
            piece.fresh,
        )


def _matrix(piece: Piece, found: Cover) -> Mask:
    if isinstance(piece.mask, int):
        return found.masks[piece.mask].factors[0]
    shape = piece.queries.length, piece.keys.length
    return np.tri(*shape, dtype=np.bool_) if piece.mask == "causal" else np.ones(shape, dtype=np.bool_)
