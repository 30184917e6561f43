"""Cover relations that read coordinates: cut them where segments meet, and cover each part by bricks of its grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from attnc.compiler.analysis.intervals import fits_word, simplified
from attnc.compiler.analysis.separation import CoordinateLeaves, NotSeparableError, grid_of, separate
from attnc.compiler.ir import Compare, Const, Coord, Index, Linear, Position, Truth, fold
from attnc.compiler.ir.rewrite import substitute, walk
from attnc.compiler.planning.bricks import AxisTable, choose_bricks
from attnc.compiler.planning.cpu_plan import PlanPiece
from attnc.compiler.planning.pieces import Cover, CoverSum
from attnc.compiler.planning.rates import PieceWork, Rates
from attnc.spec.errors import EvaluationError

MOST_CUTS = 8
"""Maximum number of cuts along rows or keys; a relation with more is not cut."""

Solve = Callable[[Index, int, int], "SolvedCover | None"]
"""(relation, rows, keys) → the cover of a part without a grid; None if no good cover was found."""


@dataclass(frozen=True, slots=True)
class SolvedCover:
    """A cover with its tile size, the number of such tiles of dense attention, and the cost in nanoseconds."""

    cover: Cover
    tile: int
    total: int
    cost: float


@dataclass(frozen=True, slots=True)
class GridCover(SolvedCover):
    """A cover of a relation by bricks; `bricks`: the sizes that occur, in tokens along each axis."""

    bricks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _SegmentPair:
    """Rows and keys of two segments, and the relation between them over positions within the segments."""

    row: int
    key: int
    n_q: int
    n_k: int
    relation: Index


def reads_coordinates(relation: Index) -> bool:
    """Whether a relation reads coordinates, so that bricks may cover it."""
    return any(isinstance(node, Coord) for node in walk(relation))


def cover_by_grid(
    relation: Index, n_q: int, n_k: int, rates: Rates, work: PieceWork, solve: Solve, rank: int = 0
) -> GridCover | None:
    """Return the cover of a relation by bricks of its grids, None if the relation does not separate by axis.

    `rank`: which bricks are taken in the order of the cost model, 0 for the cheapest.
    """
    covers = _Covers(n_q * n_k, rates, work, solve, rank)
    try:
        for part in parts_of(relation, n_q, n_k):
            covers.add(part)
    except (NotSeparableError, EvaluationError):  # a condition on another axis may guard against the fault
        return None
    return covers.grid_cover() if covers.bricks else None


class _Covers:
    """Collects the covers of the parts of a relation."""

    def __init__(self, pairs: int, rates: Rates, work: PieceWork, solve: Solve, rank: int) -> None:
        self.bricks: dict[tuple[int, ...], None] = {}
        self._rates, self._work = rates, work
        self._rank = rank
        self._pairs = pairs
        self._most_pairs = max(1 << 16, min(1 << 22, pairs // 8192))
        self._solve = solve
        self._cover_sum = CoverSum()
        self._written: set[int] = set()
        self._tables: dict[tuple[Index, object], AxisTable] = {}
        self._total = 0
        self._cost = 0.0

    def add(self, part: _SegmentPair) -> None:
        """Cover a part and add its pieces; raise NotSeparableError if no cover is found."""
        grid = grid_of(part.relation, part.n_q) if part.n_q == part.n_k else None
        if grid is None:
            if part.n_q * part.n_k == self._pairs:
                raise NotSeparableError
            solved = self._solve(part.relation, part.n_q, part.n_k)
            if solved is None:
                raise NotSeparableError
            self._take(part, solved.cover, solved.total, solved.cost)
            return
        leaves = CoordinateLeaves(part.relation, grid)
        if not fits_word(part.relation, (0, part.n_q), (0, part.n_k)):
            raise NotSeparableError
        for relations in separate(part.relation, leaves):
            tables = [self._table(r, leaves, i) for i, r in enumerate(relations)]
            bricks = choose_bricks(tables, self._rates, self._work, self._rank)
            if bricks is not None:
                self.bricks[bricks.tiles] = None
                self._take(part, bricks.cover, bricks.total, bricks.cost)

    def _table(self, relation: Index, leaves: CoordinateLeaves, i: int) -> AxisTable:
        key = (relation, leaves.grid[i])
        if key not in self._tables:
            self._tables[key] = AxisTable(relation, i, leaves, self._most_pairs, self._along)
        return self._tables[key]

    def _along(self, relation: Index, extent: int) -> tuple[Cover, int] | None:
        solved = self._solve(relation, extent, extent)
        return None if solved is None else (solved.cover, solved.tile)

    def _take(self, part: _SegmentPair, part_cover: Cover, total: int, cost: float) -> None:
        """Add the cover of a part, moved to the rows and keys of its segments."""
        fresh = part.row not in self._written
        if part_cover.pieces:
            self._written.add(part.row)
        self._total += total
        self._cost += cost

        def place(piece: PlanPiece) -> PlanPiece:
            if fresh and part.row == part.key == 0:
                return piece
            queries, keys = piece.queries.moved(part.row), piece.keys.moved(part.key)
            return replace(piece, queries=queries, keys=keys, fresh=fresh and piece.fresh)

        self._cover_sum.add(part_cover, place)

    def grid_cover(self) -> GridCover:
        """Return the cover of all parts."""
        bricks = tuple(self.bricks)
        return GridCover(self._cover_sum.cover(), max(map(prod, bricks)), self._total, self._cost, bricks)


def parts_of(relation: Index, n_q: int, n_k: int) -> Iterator[_SegmentPair]:
    """Yield the parts of a relation cut at the rows and keys where its segments begin; empty parts are left out."""
    q, k = fold.place("q"), fold.place("k")
    rows, keys = _cuts(relation, "q", n_q), _cuts(relation, "k", n_k)
    for row, row_stop in pairwise(rows):
        for key, key_stop in pairwise(keys):
            if (row, row_stop, key, key_stop) == (0, n_q, 0, n_k):
                yield _SegmentPair(0, 0, n_q, n_k, relation)
                return
            moved = substitute(relation, {q: fold.add(q, fold.const(row)), k: fold.add(k, fold.const(key))})
            part_relation = simplified(moved, (0, row_stop - row), (0, key_stop - key))
            if not (isinstance(part_relation, Truth) and not part_relation.value):
                yield _SegmentPair(row, key, row_stop - row, key_stop - key, part_relation)


def _cuts(relation: Index, name: str, n: int) -> list[int]:
    """Return 0, n, and the tokens at which a comparison of one position flips or a segment's coordinates begin."""
    turns = {0, n}
    for node in walk(relation):
        if (
            isinstance(node, Compare)
            and node.op == "ge"
            and isinstance(node.value, Linear)
            and len(node.value.terms) == 1
        ):
            ((term, factor),) = node.value.terms
            if isinstance(term, Position) and term.name == name and abs(factor) == 1:
                turns.add(-node.value.constant if factor == 1 else node.value.constant + 1)
        elif isinstance(node, Coord) and _is_position(node.position, name) and isinstance(node.offset, Const):
            turns.add(node.offset.value)
    cuts = sorted(c for c in turns if 0 <= c <= n)
    return cuts if len(cuts) <= MOST_CUTS + 2 else [0, n]


def _is_position(node: Index, name: str) -> bool:
    return isinstance(node, Position) and node.name == name
