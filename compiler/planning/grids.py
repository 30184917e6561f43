"""Relations that read coordinates: cut where segments of tokens meet, and each part covered by bricks of its grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from attnc.compiler import fold
from attnc.compiler.analysis.intervals import fits_word, simplified
from attnc.compiler.analysis.separation import CoordinateLeaves, NotSeparableError, grid_of, separate
from attnc.compiler.ir import Compare, Const, Coord, Index, Linear, Position, Truth
from attnc.compiler.planning.bricks import AxisTable, choose_bricks
from attnc.compiler.planning.cpu_plan import PlanPiece
from attnc.compiler.planning.pieces import Cover, CoverSum
from attnc.compiler.planning.rates import PieceWork, Rates
from attnc.compiler.rewrite import substitute, walk
from attnc.spec.errors import EvaluationError

MOST_CUTS = 8

Solve = Callable[[Index, int, int], "SolvedCover | None"]
"""(relation, rows, keys) → a cover of a part that has no grid; None where it has no good one."""


@dataclass(frozen=True, slots=True)
class SolvedCover:
    """A cover, the tile that it is counted in, and the tiles of that size that dense attention has."""

    cover: Cover
    tile: int
    total: int
    cost: float


@dataclass(frozen=True, slots=True)
class GridCover:
    """A cover by parts; `bricks` says of what sizes."""

    cover: Cover
    tile: int
    total: int
    cost: float
    bricks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _SegmentPair:
    """Rows and keys of two segments, and the relation between them, over their own numbers."""

    row: int
    key: int
    n_q: int
    n_k: int
    relation: Index


def reads_coordinates(relation: Index) -> bool:
    """Whether there is anything here to do."""
    return any(isinstance(node, Coord) for node in walk(relation))


def cover_by_grid(
    relation: Index, n_q: int, n_k: int, rates: Rates, work: PieceWork, solve: Solve, rank: int = 0
) -> GridCover | None:
    """The relation covered by bricks of its grids, None where it does not separate by axis.

    `rank`: which bricks are taken, of those that the cost model likes, the best first.
    """
    covers = _Covers(n_q * n_k, rates, work, solve, rank)
    try:
        for part in parts_of(relation, n_q, n_k):
            covers.add(part)
    except (NotSeparableError, EvaluationError):  # a fault may be one that a condition on another axis guards
        return None
    return covers.found() if covers.bricks else None


class _Covers:
    """Covers of parts, put together."""

    def __init__(self, pairs: int, rates: Rates, work: PieceWork, solve: Solve, rank: int) -> None:
        self.bricks: dict[tuple[int, ...], None] = {}
        self._rates, self._work = rates, work
        self._rank = rank
        self._pairs = pairs
        self._most_pairs = max(1 << 16, min(1 << 22, pairs // 8192))
        self._solve = solve
        self._gathered = CoverSum()
        self._written: set[int] = set()
        self._tables: dict[tuple[Index, object], AxisTable] = {}
        self._total = 0
        self._cost = 0.0

    def add(self, part: _SegmentPair) -> None:
        """Cover a part."""
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

    def _take(self, part: _SegmentPair, found: Cover, total: int, cost: float) -> None:
        fresh = part.row not in self._written
        if found.pieces:
            self._written.add(part.row)
        self._total += total
        self._cost += cost

        def place(piece: PlanPiece) -> PlanPiece:
            if fresh and part.row == part.key == 0:
                return piece
            queries, keys = piece.queries.moved(part.row), piece.keys.moved(part.key)
            return replace(piece, queries=queries, keys=keys, fresh=fresh and piece.fresh)

        self._gathered.add(found, place)

    def found(self) -> GridCover:
        """All parts as one cover."""
        bricks = tuple(self.bricks)
        return GridCover(self._gathered.cover(), max(map(prod, bricks)), self._total, self._cost, bricks)


def parts_of(relation: Index, n_q: int, n_k: int) -> Iterator[_SegmentPair]:
    """The relation cut at the rows and keys where its segments begin."""
    q, k = fold.place("q"), fold.place("k")
    rows, keys = _cuts(relation, "q", n_q), _cuts(relation, "k", n_k)
    for row, row_stop in pairwise(rows):
        for key, key_stop in pairwise(keys):
            if (row, row_stop, key, key_stop) == (0, n_q, 0, n_k):
                yield _SegmentPair(0, 0, n_q, n_k, relation)
                return
            moved = substitute(relation, {q: fold.add(q, fold.const(row)), k: fold.add(k, fold.const(key))})
            own = simplified(moved, (0, row_stop - row), (0, key_stop - key))
            if not (isinstance(own, Truth) and not own.value):
                yield _SegmentPair(row, key, row_stop - row, key_stop - key, own)


def _cuts(relation: Index, name: str, n: int) -> list[int]:
    """0, n, and the tokens at which a comparison with one position turns or a segment's coordinates begin."""
    found = {0, n}
    for node in walk(relation):
        if (
            isinstance(node, Compare)
            and node.op == "ge"
            and isinstance(node.value, Linear)
            and len(node.value.terms) == 1
        ):
            ((term, factor),) = node.value.terms
            if isinstance(term, Position) and term.name == name and abs(factor) == 1:
                found.add(-node.value.constant if factor == 1 else node.value.constant + 1)
        elif isinstance(node, Coord) and _is(node.position, name) and isinstance(node.offset, Const):
            found.add(node.offset.value)
    cuts = sorted(c for c in found if 0 <= c <= n)
    return cuts if len(cuts) <= MOST_CUTS + 2 else [0, n]


def _is(node: Index, name: str) -> bool:
    return isinstance(node, Position) and node.name == name
