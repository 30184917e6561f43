"""Build pieces from runs: equal runs at even steps become one call on strided views."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.hashing import combine, kinds, mix
from attnc.compiler.analysis.intervals import simplified
from attnc.compiler.analysis.live_tiles import LiveTiles, TileGrid, find_live_tiles
from attnc.compiler.analysis.repetition import find_repeated_tiles
from attnc.compiler.ir import Index
from attnc.compiler.planning.cpu_plan import GridMask, Mask, PlanPiece, Strip, StripAxis, stretch, strip
from attnc.compiler.planning.runs import (
    EVALUATED,
    SHARED,
    Int64,
    ResolvedRuns,
    Runs,
    TooManyClassesError,
    cut_at_steps,
    find_runs,
    is_diagonal,
    resolve,
    run_mask,
    split_runs,
    staircases,
)
from attnc.spec.source import Span

MAX_MASK_ELEMENTS = 1 << 23
"""Maximum number of elements of all shared masks of a cover; beyond it, masks are evaluated as the pieces run."""


@dataclass(frozen=True, slots=True)
class Cover:
    """Pieces that hold every visible pair of a relation once, with their masks and the counts of tiles and pairs.

    `visible`: the number of visible pairs, None where it was not counted.
    """

    pieces: tuple[PlanPiece, ...]
    masks: tuple[GridMask, ...]
    full_tiles: int
    partial_tiles: int
    visible: int | None


def cover(relation: Index, grid: TileGrid, origins: Mapping[Index, Span]) -> Cover:
    """Return the cover of a specialised relation on a tile grid.

    Where the partial tiles are too different to share masks, their masks are evaluated as the pieces run.
    Raises TooManyTilesError or TooManyClassesError if tiles of this size do not describe the relation, and
    EvaluationError if it faults.
    """
    simplified_relation = simplified(relation, (0, grid.n_q), (0, grid.n_k)) if grid.n_q and grid.n_k else relation
    tiles = find_repeated_tiles(simplified_relation, grid) or find_live_tiles(simplified_relation, grid)
    try:
        return _cover(resolve(relation, tiles, origins))
    except TooManyClassesError:
        _check_worthwhile(tiles)
    most_classes = MAX_MASK_ELEMENTS // (4 * grid.q_tile * grid.k_tile)
    try:
        return _cover(resolve(relation, tiles, origins, most=most_classes))
    except TooManyClassesError:
        return _cover(resolve(relation, tiles, origins, most=0))


def _cover(resolved: ResolvedRuns) -> Cover:
    """Return the cover of resolved live tiles."""
    tiles = resolved.tiles
    runs = cut_at_steps(find_runs(tiles), resolved)
    groups, in_no_group = staircases(runs, resolved)
    builder = _Builder(tiles.grid, resolved)
    for group in groups:
        builder.add_staircase(runs, group)
    other_runs = split_runs(runs.take(in_no_group))
    if (tiles.repeat > 1).any():
        other_runs = builder.add_repeated(other_runs)
    builder.add_runs(other_runs)
    return Cover(builder.ordered(), builder.grid_masks(), tiles.full, tiles.partial, resolved.visible)


def _check_worthwhile(tiles: LiveTiles) -> None:
    """Raise TooManyClassesError if most tiles from the first to the last live tile of the rows are partial."""
    _, low, high = _hulls(tiles)
    if 2 * tiles.partial * tiles.grid.k_tile > int((high - low).sum()):
        raise TooManyClassesError


class CoverSum:
    """The sum of covers of parts of a relation: pieces moved, masks renumbered, tiles and pairs added."""

    def __init__(self) -> None:
        self._pieces: list[PlanPiece] = []
        self._masks: list[GridMask] = []
        self._first_mask: dict[int, tuple[int, Cover]] = {}  # by id(part); the part is kept so that its id stays valid
        self._full = self._partial = self._visible = 0

    def add(self, part: Cover, place: Callable[[PlanPiece], PlanPiece]) -> None:
        """Add a part's cover, which has no exact masks; `place` moves a piece to the relation's tokens."""
        if id(part) not in self._first_mask:
            self._first_mask[id(part)] = len(self._masks), part
            self._masks.extend(part.masks)
        first, _ = self._first_mask[id(part)]
        for piece in part.pieces:
            placed = place(piece)
            mask = placed.mask
            self._pieces.append(replace(placed, mask=mask + first) if first and isinstance(mask, int) else placed)
        self._full += part.full_tiles
        self._partial += part.partial_tiles
        self._visible += part.visible or 0

    def cover(self) -> Cover:
        """Return the cover of all parts."""
        return Cover(join_pieces(self._pieces), tuple(self._masks), self._full, self._partial, self._visible)


@dataclass(frozen=True, slots=True)
class _Shape:
    """The mask shared by runs of one signature, and the part of a run that remains after hidden edges are cut off."""

    mask: Literal["full", "causal", "exact"] | int
    top: int
    height: int
    left: int
    width: int


class _Builder:
    """Collects the pieces of a cover; `_written` marks the tile rows that already have a piece."""

    def __init__(self, grid: TileGrid, resolved: ResolvedRuns) -> None:
        self.masks: list[Mask] = []
        self._grid = grid
        self._resolved = resolved
        self._pieces: list[PlanPiece] = []
        self._written = np.zeros(grid.rows, dtype=np.bool_)

    def ordered(self) -> tuple[PlanPiece, ...]:
        """Return the pieces in the order in which they must run."""
        return join_pieces(self._pieces)

    def grid_masks(self) -> tuple[GridMask, ...]:
        """Return the masks to which the pieces refer by index."""
        return tuple(GridMask((mask,)) for mask in self.masks)

    def add_staircase(self, runs: Runs, group: Int64) -> None:
        """Add a triangle on the diagonal and the rectangle to the left of it."""
        first, last = group[0], group[-1]
        start, _ = self._grid.row_range(int(runs.row[first]))
        _, stop = self._grid.row_range(int(runs.row[last]))
        corner, _ = self._grid.key_range(int(runs.end[first]) - 1)
        rows = stretch(start, stop)
        self._pieces.append(PlanPiece(rows, stretch(corner, corner + stop - start), "causal"))
        left, _ = self._grid.key_range(int(runs.column[first]))
        if left < corner:
            self._pieces.append(PlanPiece(rows, stretch(left, corner), "full", fresh=False))
        self._written[runs.row[group]] = True

    def add_runs(self, runs: Runs) -> None:
        """Add all other runs: one run of each row writes it, the others merge; a bucket has at most one run per row."""
        if not len(runs):
            return
        row, keys, shape = runs.row, self._key_starts(runs.column), self._shape_numbers(runs)
        bucket, size = self._buckets(runs, shape)
        fresh = self._first_of_row(row, size)
        part = bucket * 2 + ~fresh
        order = np.argsort(part * self._grid.rows + row)  # the sort keys are unique
        shapes: dict[int, _Shape] = {}
        for group in even_steps(part[order], row[order], keys[order]):
            members = order[group]
            member, second = int(members[0]), int(members[min(1, len(members) - 1)])
            shape_number = int(shape[member])
            if shape_number not in shapes:
                shapes[shape_number] = self._shape(runs, member)
            steps = int(row[second] - row[member]), int(keys[second] - keys[member])
            piece = self._piece(int(row[member]), int(keys[member]), steps, len(members), shapes[shape_number])
            self._pieces.append(piece if fresh[member] else replace(piece, fresh=False))

    def _shape_numbers(self, runs: Runs) -> Int64:
        """Return a number for each run that is equal for runs with equal masks."""
        return kinds(combine(runs.signature, *map(mix, self._extents(runs)))).number

    def add_repeated(self, runs: Runs) -> Runs:
        """Add runs that repeat in consecutive rows, straight below or shifted right, and return the remaining runs."""
        row, shape = runs.row, self._shape_numbers(runs)
        span = self._grid.rows + self._grid.columns
        names = np.stack([shape * span + runs.column, shape * span + runs.column - row + self._grid.rows])
        sizes = np.stack([self._sizes(runs, name, slope) for slope, name in enumerate(names)])
        slope = np.where(runs.repeat > 1, runs.slope, (sizes[1] > sizes[0]).astype(np.int64))
        size, bucket = (np.where(slope, x[1], x[0]) for x in (sizes, names))
        repeated = (size >= SHARED) | (runs.repeat > 1)
        if repeated.any():
            self._add_repeated(runs.take(repeated), *(x[repeated] for x in (shape, slope, bucket * 2 + slope, size)))
        return runs.take(~repeated)

    def _sizes(self, runs: Runs, bucket: Int64, slope: int) -> Int64:
        """Return the number of runs in the bucket of each run, without repeated runs of the other slope."""
        buckets = kinds(bucket)
        counted = np.where((runs.repeat == 1) | (runs.slope == slope), runs.repeat, 0)
        return np.bincount(buckets.number, weights=counted).astype(np.int64)[buckets.number]

    def _add_repeated(self, runs: Runs, shape: Int64, slope: Int64, bucket: Int64, size: Int64) -> None:
        """Add runs as one piece for every sequence of rows that continues without a gap."""
        row, keys, repeat = runs.row, self._key_starts(runs.column), runs.repeat
        fresh = self._first_of_row(row, size)
        part = kinds(bucket * 2 + ~fresh).number
        order = np.argsort(part * self._grid.rows + row)  # the sort keys are unique
        step = slope * self._grid.k_tile
        follows = (part[order][1:] == part[order][:-1]) & ((row + repeat)[order][:-1] == row[order][1:])
        follows &= keys[order][1:] - keys[order][:-1] == (repeat * step)[order][:-1]
        shapes: dict[int, _Shape] = {}
        for group in np.split(order, np.flatnonzero(~follows) + 1):
            run = int(group[0])
            shape_number, count = int(shape[run]), int(repeat[group].sum())
            if shape_number not in shapes:
                shapes[shape_number] = self._shape(runs, run)
            piece = self._piece(int(row[run]), int(keys[run]), (1, int(step[run])), count, shapes[shape_number])
            self._pieces.append(piece if fresh[run] else replace(piece, fresh=False))
        for first, stop in zip(row.tolist(), (row + repeat).tolist(), strict=True):
            self._written[first:stop] = True

    def _buckets(self, runs: Runs, shape: Int64) -> tuple[Int64, Int64]:
        """Return the bucket of each run and the number of runs in it.

        A bucket holds runs of one shape along a diagonal or in one column, whichever are more; runs that share with
        too few others are grouped by their number within the row.
        """
        row, column = runs.row, runs.column
        span = self._grid.rows + self._grid.columns
        diagonal, vertical = shape * span + (column - row + self._grid.rows), shape * span + column
        diagonal_size, vertical_size = _occurrences(diagonal), _occurrences(vertical)
        number_in_row = np.arange(len(row)) - np.searchsorted(row, row)
        is_rare = np.maximum(diagonal_size, vertical_size) < SHARED
        bucket = np.where(diagonal_size >= vertical_size, diagonal * 3, vertical * 3 + 1)
        bucket = np.where(is_rare, (shape * span + number_in_row) * 3 + 2, bucket)
        return bucket, np.where(is_rare, 1, np.maximum(diagonal_size, vertical_size))

    def _first_of_row(self, row: Int64, size: Int64) -> NDArray[np.bool_]:
        """Mark, in each row that has no piece yet, the run of the largest bucket."""
        starts = np.flatnonzero(np.append(True, row[1:] != row[:-1]))
        length = np.diff(np.append(starts, len(row)))
        score = size * len(row) - np.arange(len(row))
        return np.asarray((score == np.repeat(np.maximum.reduceat(score, starts), length)) & ~self._written[row])

    def _key_starts(self, column: Int64) -> Int64:
        return np.maximum(self._grid.k_origin + column * self._grid.k_tile, 0)

    def _extents(self, runs: Runs) -> tuple[Int64, Int64, Int64]:
        """Return the heights of runs and the widths of their first and last tile, clipped by the matrix."""
        grid = self._grid
        start = runs.row * grid.q_tile
        height = np.minimum(start + grid.q_tile, grid.n_q) - start
        widths = []
        for column in (runs.column, runs.end - 1):
            stop = np.minimum(grid.k_origin + (column + 1) * grid.k_tile, grid.n_k)
            widths.append(stop - self._key_starts(column))
        return height, widths[0], widths[1]

    def _shape(self, runs: Runs, i: int) -> _Shape:
        """Return the mask of run i and its extent without hidden edge rows and columns."""
        parts = runs.parts(i)
        kinds_of_parts = {kind for _, _, kind in parts}
        if EVALUATED in kinds_of_parts or kinds_of_parts == {0}:
            start, stop = self._grid.row_range(int(runs.row[i]))
            low, _ = self._grid.key_range(parts[0][0])
            _, high = self._grid.key_range(parts[-1][0] + parts[-1][1] - 1)
            return _Shape("exact" if EVALUATED in kinds_of_parts else "full", 0, stop - start, 0, high - low)
        mask = run_mask(runs, i, self._resolved)
        (top, bottom), (left, right) = (_extent(np.asarray(mask.any(axis=axis))) for axis in (1, 0))
        mask = mask[top:bottom, left:right]
        return _Shape(self._mask_name(mask), top, bottom - top, left, right - left)

    def _mask_name(self, mask: Mask) -> Literal["full", "causal"] | int:
        if mask.all():
            return "full"
        return "causal" if is_diagonal(mask) else self._mask_index(np.ascontiguousarray(mask))

    def _mask_index(self, mask: Mask) -> int:
        """Return the index of a shared mask, which is appended if no equal mask exists."""
        for i, shared in enumerate(self.masks):
            if shared.shape == mask.shape and np.array_equal(shared, mask):
                return i
        if sum(shared.size for shared in self.masks) + mask.size > MAX_MASK_ELEMENTS:
            raise TooManyClassesError
        self.masks.append(mask)
        return len(self.masks) - 1

    def _piece(self, row: int, key: int, steps: tuple[int, int], count: int, shape: _Shape) -> PlanPiece:
        """Return the piece of `count` runs of one shape; `steps`: tile rows and keys from one run to the next."""
        start, stop = self._grid.row_range(row)
        whole_rows = shape.height == stop - start
        start, key = start + shape.top, key + shape.left
        q_step, k_step = (steps[0] * self._grid.q_tile, steps[1]) if count > 1 else (0, 0)
        joins = whole_rows and shape.mask in ("full", "exact")
        if (joins or count == 1) and k_step == 0 and q_step in (0, shape.height):
            return PlanPiece(stretch(start, start + shape.height * count), stretch(key, key + shape.width), shape.mask)
        queries = strip(start, q_step, count, shape.height)
        return PlanPiece(queries, strip(key, k_step, count, shape.width), shape.mask)


def _extent(marks: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the half-open range from the first marked entry to the last."""
    marked = np.flatnonzero(marks)
    return int(marked[0]), int(marked[-1]) + 1


def _occurrences(names: Int64) -> Int64:
    """Return, for each entry, how often its name occurs."""
    if int(names.max()) <= 16 * len(names) + (1 << 16):
        return np.bincount(names)[names]
    groups = kinds(names)
    return groups.members[groups.number]


def even_steps(bucket: Int64, row: Int64, key: Int64) -> Iterator[slice]:
    """Yield slices of entries of one bucket whose rows and keys advance by constant steps, keys never backwards.

    The entries are sorted by bucket, then by row.
    """
    rows, keys = np.diff(row), np.diff(key)
    joins = (bucket[1:] == bucket[:-1]) & (keys >= 0)
    same = joins[1:] & joins[:-1] & (rows[1:] == rows[:-1]) & (keys[1:] == keys[:-1])
    ends = np.flatnonzero(np.append(~same, True)) + 1  # the entry at which each stretch of equal steps ends
    end_of = ends[np.searchsorted(ends, np.arange(1, len(joins) + 1))] if len(joins) else ends
    begin = 0
    while begin < len(row):
        stop = int(end_of[begin]) + 1 if begin < len(joins) and joins[begin] else begin + 1
        yield slice(begin, stop)
        begin = stop


def dense_cover(grid: TileGrid, tiles: LiveTiles | None) -> Cover:
    """Return blocks of rows against the keys from the first to the last live tile, with masks evaluated at run time.

    Equal blocks at even steps are one piece.
    """
    row = np.arange(grid.rows, dtype=np.int64)
    low, high = np.zeros_like(row), np.full_like(row, grid.n_k)
    if tiles is not None:
        row, low, high = _hulls(tiles)
    start = row * grid.q_tile
    height, width = np.minimum(start + grid.q_tile, grid.n_q) - start, high - low
    order = np.lexsort((start, width, height))
    order = order[width[order] > 0]
    start, low, height, width = start[order], low[order], height[order], width[order]
    pieces = []
    for group in even_steps(width * (grid.n_q + 1) + height, start, low):
        first, count = group.start, group.stop - group.start
        steps = (int(x[first + 1] - x[first]) if count > 1 else 0 for x in (start, low))
        rows, keys = (
            strip(int(begin[first]), step, count, int(length[first]))
            for begin, step, length in zip((start, low), steps, (height, width), strict=True)
        )
        pieces.append(PlanPiece(rows, keys, "exact"))
    if tiles is None:
        return Cover(tuple(pieces), (), 0, grid.rows * grid.columns, None)
    return Cover(tuple(pieces), (), tiles.full, tiles.partial, None)


def _hulls(tiles: LiveTiles) -> tuple[Int64, Int64, Int64]:
    """Return the tile rows with live tiles, and the range of keys from the first live tile to the last of each."""
    first = np.flatnonzero(np.append(len(tiles.row) > 0, tiles.row[1:] != tiles.row[:-1]))
    last = np.append(first[1:], len(tiles.row)) - 1 if len(first) else first
    grid, column = tiles.grid, tiles.column.astype(np.int64)
    low = np.maximum(grid.k_origin + column[first] * grid.k_tile, 0)
    high = np.minimum(grid.k_origin + (column + tiles.count)[last] * grid.k_tile, grid.n_k)
    return tiles.row[first].astype(np.int64), low, high


def join_pieces(pieces: Iterable[PlanPiece]) -> tuple[PlanPiece, ...]:
    """Return the pieces that write rows, then the pieces that merge; equal stretches at even steps become one piece."""
    result: list[PlanPiece] = []
    for piece in sorted(pieces, key=lambda p: not p.fresh):
        joined = _join(result[-1], piece) if result else None
        if joined is None:
            result.append(piece)
        else:
            result[-1] = joined
    return tuple(result)


def _join(a: PlanPiece, b: PlanPiece) -> PlanPiece | None:
    """Return the piece `a` extended by the single stretch of `b`, None where they do not fit together."""
    if (a.mask, a.fresh) != (b.mask, b.fresh) or a.mask == "exact" or b.queries.count != 1:
        return None
    queries, keys = _append(a.queries, b.queries), _append(a.keys, b.keys)
    if queries is None or keys is None or not queries.axes[0].apart:
        return None
    return PlanPiece(queries, keys, a.mask, a.fresh)


def _append(a: Strip, b: Strip) -> Strip | None:
    """Return the stretches of `a` and the single one of `b` as one strip if alike and evenly spaced, else None."""
    if len(a.axes) > 1 or len(b.axes) > 1:
        return None
    axis, added = a.axes[0], b.axes[0]
    step = b.start - (a.start + (axis.count - 1) * axis.step)
    equal = (axis.length, axis.stride) == (added.length, added.stride)
    if not equal or step < 0 or (axis.count > 1 and step != axis.step):
        return None
    return Strip(a.start, (StripAxis(step, axis.count + 1, axis.length, axis.stride),))
