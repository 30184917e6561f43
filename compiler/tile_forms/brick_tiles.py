"""Bricks of a grid of tokens: products of one-axis runs, kept as they are and listed brick by brick only on request.

A brick of a product is live where every axis is and full where every axis is, so the axes say how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import numpy as np

from attnc.compiler.analysis import separation, tiles
from attnc.compiler.ir import Index
from attnc.compiler.planning.plan import GridMask
from attnc.compiler.planning.runs import MAX_CLASS_ELEMENTS, TooManyClassesError, resolve
from attnc.compiler.tile_forms.arrays import Artefact, Int64, Mask, frozen, pointers_of
from attnc.compiler.tile_forms.tile_lists import Segment, TileLists
from attnc.compiler.tile_forms.tile_runs import (
    Frame,
    TileRuns,
    find_tile_runs,
    frame_of,
    join_classes,
    multiplied_frame,
)
from attnc.spec.source import Span


@dataclass(frozen=True, eq=False)
class BrickProduct(Artefact):
    """The runs of every axis, the slowest first."""

    axes: tuple[TileRuns, ...]

    @property
    def full(self) -> int:
        """Pairs of bricks that see each other wholly."""
        return prod(axis.full.tiles for axis in self.axes)

    @property
    def partial(self) -> int:
        """Pairs of bricks that see something of each other."""
        return prod(axis.full.tiles + axis.partial.tiles for axis in self.axes) - self.full

    @property
    def visible(self) -> int:
        """Visible pairs of tokens."""
        return prod(axis.visible for axis in self.axes)

    def transposed(self) -> BrickProduct:
        """By bricks of keys."""
        return BrickProduct(tuple(axis.transposed() for axis in self.axes))

    def __str__(self) -> str:
        lines = [f"{self.full} full and {self.partial} partial bricks"]
        return "\n".join([*lines, *(f"axis {i}: {axis}" for i, axis in enumerate(self.axes))])


@dataclass(frozen=True, eq=False)
class BrickTiles(Artefact):
    """Products that share no visible pair and together are the relation; `frames`: the bricks along every axis.

    Two products may see parts of one brick.
    """

    frames: tuple[Frame, ...]
    products: tuple[BrickProduct, ...]

    @property
    def frame(self) -> Frame:
        """Bricks numbered with the last axis fastest, and so are the tokens of each."""
        return multiplied_frame(self.frames)

    @property
    def visible(self) -> int:
        """Visible pairs of tokens."""
        return sum(product.visible for product in self.products)

    def transposed(self) -> BrickTiles:
        """By bricks of keys."""
        frames = tuple(frame.transposed() for frame in self.frames)
        return BrickTiles(frames, tuple(product.transposed() for product in self.products))

    def enumerated(self) -> TileLists:
        """Every live brick, its mask put together from all products.

        Raises TooManyClassesError when the masks would have more than MAX_CLASS_ELEMENTS elements.
        """
        frame = self.frame
        return _listed(frame, [_multiplied(product) for product in self.products])

    def __str__(self) -> str:
        return "\n".join(map(str, self.products)) or "nothing"


def find_brick_tiles(
    products: Sequence[separation.Product],
    grid: separation.TokenGrid,
    q_brick: Sequence[int],
    k_brick: Sequence[int],
    origins: Mapping[Index, Span],
) -> BrickTiles:
    """The bricks of a relation's products (`separate_axes`), of so many coordinates along each axis.

    Raises TooManyTilesError or TooManyClassesError where tiles of this size do not describe an axis, and
    EvaluationError.
    """
    grids = [tiles.Grid(axis.extent, axis.extent, q, k) for axis, q, k in zip(grid, q_brick, k_brick, strict=True)]
    known: dict[tuple[Index, tiles.Grid], TileRuns] = {}

    def runs(relation: Index, of: tiles.Grid) -> TileRuns:
        if (relation, of) not in known:
            known[relation, of] = find_tile_runs(resolve(relation, tiles.find_live_tiles(relation, of), origins))
        return known[relation, of]

    found = tuple(BrickProduct(tuple(map(runs, product, grids))) for product in products)
    return BrickTiles(tuple(map(frame_of, grids)), found)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Live tiles in any order; one of kind i sees the product of `factors[i]`."""

    row: Int64
    column: Int64
    kind: Int64
    factors: list[tuple[Mask, ...]]


def _of_axis(runs: TileRuns) -> _Tiles:
    """Full tiles are of a kind for each shape, partial ones of one for each class."""
    row, column = runs.full.listed()
    sizes = np.stack([runs.frame.heights[row], runs.frame.widths[column]], axis=1)
    shapes, kind = np.unique(sizes, axis=0, return_inverse=True)
    masks = [np.ones(shape, dtype=np.bool_) for shape in shapes.tolist()]
    rows, columns = runs.partial.listed()
    kinds = np.append(kind.ravel(), runs.classes.astype(np.int64) + len(masks)).astype(np.int64)
    return _Tiles(np.append(row, rows), np.append(column, columns), kinds, [(m,) for m in (*masks, *runs.masks)])


def _multiplied(product: BrickProduct) -> _Tiles:
    found = _of_axis(product.axes[0])
    for axis in product.axes[1:]:
        one = _of_axis(axis)
        row = np.add.outer(found.row * axis.frame.rows, one.row).ravel()
        column = np.add.outer(found.column * axis.frame.columns, one.column).ravel()
        code = np.add.outer(found.kind * len(one.factors), one.kind).ravel()
        used, kind = np.unique(code, return_inverse=True)
        pairs = zip(*np.divmod(used, max(len(one.factors), 1)), strict=True)
        found = _Tiles(row, column, kind, [found.factors[a] + one.factors[b] for a, b in pairs])
    return found


def _listed(frame: Frame, parts: Sequence[_Tiles]) -> TileLists:
    """Tiles of several parts, those at one place as one."""
    first = np.cumsum([0, *(len(part.factors) for part in parts)])
    places = [part.row * frame.columns + part.column for part in parts]
    kinds = [part.kind + at for part, at in zip(parts, first.tolist(), strict=False)]
    empty = np.zeros(0, dtype=np.int64)
    place, kind = (np.concatenate([*values, empty]) for values in (places, kinds))
    order = np.argsort(place, kind="stable")
    place, together, members = _gathered(place[order], kind[order])
    if len(members) * prod(frame.tile) > MAX_CLASS_ELEMENTS:
        raise TooManyClassesError
    factors = [f for part in parts for f in part.factors]
    masks = [reduce(np.logical_or, (GridMask(factors[i]).whole() for i in one)) for one in members]
    is_full = np.array([bool(mask.all()) for mask in masks], dtype=np.bool_)[together]
    segments = []
    for which in (is_full, ~is_full):
        row, column = np.divmod(place[which], max(frame.columns, 1))
        segments.append(Segment(pointers_of(row, frame.rows), frozen(column)))
    classes, kept = join_classes(together[~is_full], masks)
    return TileLists(frame, segments[0], segments[1], classes, kept)


def _gathered(place: Int64, kind: Int64) -> tuple[Int64, Int64, list[tuple[int, ...]]]:
    """The distinct places, and for each the number of the combination of kinds that are there; the combinations."""
    distinct, first, count = np.unique(place, return_index=True, return_counts=True)
    used, together = np.unique(kind[first], return_inverse=True)
    members = [(one,) for one in used.tolist()]
    for i in range(1, int(count.max(initial=1))):
        more = np.flatnonzero(count > i)
        pairs = np.stack([together[more], kind[first[more] + i]], axis=1)
        new, number = np.unique(pairs, axis=0, return_inverse=True)
        together[more] = number.ravel() + len(members)
        members += [(*members[a], b) for a, b in new.tolist()]
    used, together = np.unique(together, return_inverse=True)
    return distinct, together, [members[i] for i in used.tolist()]
