"""Choosing how a specialised relation is covered: candidates are built, costed and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

from attnc.compiler.analysis.live_tiles import TileGrid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Arith, Compare, Const, Index, Linear, Position
from attnc.compiler.planning.cpu_plan import PlanPiece, Strip
from attnc.compiler.planning.formulas import closed_cover
from attnc.compiler.planning.grids import SolvedCover, cover_by_grid, reads_coordinates
from attnc.compiler.planning.pieces import Cover, CoverSum, cover, dense_cover
from attnc.compiler.planning.rates import PieceWork, Rates
from attnc.compiler.planning.residues import Residue, residues, split
from attnc.compiler.planning.runs import TooManyClassesError
from attnc.compiler.planning.splitting import split_full_parts, split_triangles
from attnc.compiler.rewrite import walk
from attnc.spec.source import Span

MAX_PIECES = 4096
"""A cover with more pieces than this is not a plan but a list."""

EXACT_ROWS = 512
EXACT_ELEMENTS = 1 << 23
"""A dense row block has at most this many mask elements."""

LARGE = 1 << 28
"""Past this many pairs, the first cover by tiles is taken."""

LONG = 2_000
"""A relation of more nodes takes the first cover by tiles: each further one costs a second for some 4,000 nodes."""

SMALL = 1 << 20
"""At most this many pairs, one masked call may be the best plan."""


@dataclass(frozen=True)
class CoverProblem:
    """A relation over local rows and keys, and what its pieces will run on; `copies`: as many problems alike."""

    relation: Index
    n_q: int
    n_k: int
    dtype: str
    head_dim: int
    lanes: int
    origins: Mapping[Index, Span]
    rates: Rates
    copies: int = 1

    @cached_property
    def work(self) -> PieceWork:
        """The piece's size, for the cost model."""
        nodes = sum(1 for _ in walk(self.relation))
        return PieceWork(self.dtype, self.head_dim, self.lanes, nodes, self.copies)

    @property
    def masked_element(self) -> float:
        """One pair in dense row blocks, with its mask evaluated."""
        work = self.work
        return self.rates.element(self.dtype, EXACT_ROWS, self.head_dim) * self.lanes + work.nodes * self.rates.evaluate


@dataclass(frozen=True, slots=True)
class CoverChoice:
    """The cover taken, its grid, its cost in nanoseconds, and why the others were not.

    `total`: tiles that dense attention would compute, where the grid does not say it.
    """

    cover: Cover
    grid: TileGrid
    cost: float
    schedule: Literal["pieces", "dense by row blocks"]
    reasons: tuple[str, ...]
    fallback: str | None = None
    total: int | None = None

    @property
    def can_be_spread(self) -> bool:
        """Whether the pieces may be moved to every n-th token: a mask that is evaluated is one of adjacent tokens."""
        return self.schedule == "pieces" and not any(piece.mask == "exact" for piece in self.cover.pieces)

    @property
    def tiles(self) -> int:
        """Tiles that dense attention would compute."""
        return self.grid.rows * self.grid.columns if self.total is None else self.total


def choose(problem: CoverProblem) -> CoverChoice:
    """The cheapest cover by the cost model; where a formula covers the relation there is nothing to compare."""
    closed = by_formula(problem)
    if closed is not None:
        return in_halves(problem, closed)
    tried: list[CoverChoice] = []
    bricks = by_grid(problem)
    if bricks is not None:
        tried.append(bricks)
        small = problem.n_q * problem.n_k <= SMALL  # one masked call is tried
        if not small and bricks.cost <= _dense_cost(problem) / 2:  # natural order is not that much better than dense
            return bricks
    classes = by_residues(problem)
    if classes is not None:
        tried.append(classes)
        if _near_bound(problem, tried):  # natural order would meet a class in every tile
            return classes
    return _natural(problem, tried)


def by_formula(problem: CoverProblem) -> CoverChoice | None:
    """The relation by a formula, where one covers it: no tile is looked at."""
    grid = _grid(problem, tile_sizes(problem)[0])
    closed = closed_cover(problem.relation, grid)
    if closed is None:
        return None
    reason = f"{_described(closed, grid)}, by formula"
    return CoverChoice(closed, grid, _cost(problem, closed), "pieces", (reason,))


def by_tiles(problem: CoverProblem, tile: int, notes: list[str]) -> list[CoverChoice]:
    """Covers in natural order by tiles of one size; why there is none goes into the notes."""
    grid = _grid(problem, tile)
    try:
        found = cover(problem.relation, grid, problem.origins)
    except (TooManyTilesError, TooManyClassesError) as refusal:
        notes.append(f"tiles of {tile}: {_why(refusal)}")
        return []
    if len(found.pieces) > MAX_PIECES:
        notes.append(f"tiles of {tile}: {len(found.pieces)} pieces, more than {MAX_PIECES}")
        return []
    choices = [CoverChoice(found, grid, _cost(problem, found), "pieces", (_described(found, grid),))]
    apart = None if problem.n_q * problem.n_k > LARGE else split_full_parts(found)
    if apart is not None:
        reason = f"{_described(apart, grid)}, full parts apart"
        choices.append(CoverChoice(apart, grid, _cost(problem, apart), "pieces", (reason,)))
    return choices


def _natural(problem: CoverProblem, tried: list[CoverChoice]) -> CoverChoice:
    """The cheapest of what was tried and of covers in natural order."""
    notes: list[str] = []
    large = problem.n_q * problem.n_k > LARGE
    for tile in tile_sizes(problem):
        if tried and large:
            break
        if tried and problem.work.nodes > LONG:
            notes.append(f"tiles of {tile} are not tried: the relation has {problem.work.nodes:,} nodes")
            break
        tried += by_tiles(problem, tile, notes)
    fallback = None if tried else "; ".join(notes)
    if not tried or not (large or _beats_dense(problem, tried)):
        tried.append(dense_choice(problem))
    best = in_halves(problem, min(tried, key=lambda choice: choice.cost))
    others = tuple(_compared(other, best) for other in tried if other.cost > best.cost)
    return CoverChoice(best.cover, best.grid, best.cost, best.schedule, best.reasons + others + tuple(notes), fallback)


WORTH = 0.97
"""The share of a cover's cost that a cover with more pieces must stay below."""


def in_halves(problem: CoverProblem, choice: CoverChoice) -> CoverChoice:
    """The choice with its short triangles in halves, where that costs noticeably less."""
    halves = halved(problem, choice)
    return choice if halves is None or halves.cost >= WORTH * choice.cost else halves


def halved(problem: CoverProblem, choice: CoverChoice) -> CoverChoice | None:
    """The choice with its short triangles in halves; None where it has none."""
    halves = split_triangles(choice.cover)
    if halves is None:
        return None
    reason = f"{_described(halves, choice.grid)}, triangles in halves"
    return replace(choice, cover=halves, cost=_cost(problem, halves), reasons=(reason,))


NEAR = 4.0
"""Classes of residues within this factor of the time of the visible pairs alone are taken without a second look."""


def _beats_dense(problem: CoverProblem, tried: list[CoverChoice]) -> bool:
    """Whether a cover costs less than dense row blocks with a mask evaluated for the visible pairs alone."""
    rate = problem.masked_element * problem.copies
    return any(c.cover.visible is not None and c.cost <= c.cover.visible * rate for c in tried)


def _near_bound(problem: CoverProblem, tried: list[CoverChoice]) -> bool:
    rates = problem.rates
    rate = rates.element(problem.dtype, EXACT_ROWS, problem.head_dim) * problem.lanes * problem.copies
    return any(c.cover.visible is not None and c.cost <= NEAR * (c.cover.visible * rate + rates.call) for c in tried)


def by_residues(problem: CoverProblem) -> CoverChoice | None:
    """The relation in parts, those with a congruence by classes of residues; None where there is none."""
    parts = split(problem.relation)
    if all(part.congruence is None for part in parts):
        return None
    gathered = CoverSum()
    for part in parts:
        if part.congruence is None:
            chosen = choose(replace(problem, relation=part.relation))
            if not chosen.can_be_spread:
                return None
            gathered.add(chosen.cover, lambda piece: piece)
            continue
        known: dict[tuple[Index, int, int], CoverChoice] = {}
        for residue in residues(part, problem.n_q, problem.n_k):
            key = (residue.relation, residue.n_q, residue.n_k)
            if key not in known:
                known[key] = choose(_of_class(problem, residue))
            if not known[key].can_be_spread:
                return None
            gathered.add(known[key].cover, partial(residue.placed, fresh=len(parts) == 1))
    found = gathered.cover()
    if len(found.pieces) > MAX_PIECES:
        return None
    tile = tile_sizes(problem)[0]
    divisors = ", ".join(str(part.congruence.divisor) for part in parts if part.congruence is not None)
    reason = f"{_described(found, _grid(problem, tile))}; classes of residues modulo {divisors}"
    return CoverChoice(found, _grid(problem, tile), _cost(problem, found), "pieces", (reason,))


def by_grid(problem: CoverProblem, rank: int = 0) -> CoverChoice | None:
    """The relation by bricks of the grid whose coordinates it reads; None where it reads none or is not separable.

    `rank`: of the bricks, the best first.
    """
    if not reads_coordinates(problem.relation):
        return None

    def solve(relation: Index, n_q: int, n_k: int) -> SolvedCover | None:
        choice = choose(replace(problem, relation=relation, n_q=n_q, n_k=n_k))
        if not choice.can_be_spread:
            return None
        return SolvedCover(choice.cover, choice.grid.q_tile, choice.tiles, choice.cost)

    work = replace(problem.work, lanes=problem.lanes * problem.copies, copies=1)
    found = cover_by_grid(problem.relation, problem.n_q, problem.n_k, problem.rates, work, solve, rank)
    if found is None or len(found.cover.pieces) > MAX_PIECES:
        return None
    grid = _grid(problem, found.tile)
    sizes = ", ".join("×".join(map(str, brick)) for brick in found.bricks[:4])
    more = f" and {len(found.bricks) - 4} other sizes" if len(found.bricks) > 4 else ""
    reason = f"{_described(found.cover, grid)}; bricks of {sizes}{more} tokens"
    return CoverChoice(found.cover, grid, found.cost, "pieces", (reason,), total=found.total)


def _dense_cost(problem: CoverProblem) -> float:
    """Every pair, with a mask evaluated for it."""
    return problem.n_q * problem.n_k * problem.masked_element * problem.copies


def _of_class(problem: CoverProblem, residue: Residue) -> CoverProblem:
    copies = problem.copies * residue.divisor
    return replace(problem, relation=residue.relation, n_q=residue.n_q, n_k=residue.n_k, copies=copies)


def tile_sizes(problem: CoverProblem) -> tuple[int, ...]:
    """Row tiles to try: the relation's own blocks, what the kernel likes, and one whole tile for small problems."""
    liked = (256, 128, 64) if problem.dtype in ("bfloat16", "float16") else (128, 64, 256)
    multiples = [block * max(1, liked[0] // block) for block in sorted(blocks(problem.relation))]
    whole = [max(problem.n_q, problem.n_k, 1)] if problem.n_q * problem.n_k <= SMALL else []
    own = [multiple for multiple in multiples if multiple <= 2048][:2]
    large = problem.n_q * problem.n_k > LARGE  # then the first that works is taken
    return tuple(dict.fromkeys([*own, *liked] if large else [*liked, *own, *whole]))


def blocks(relation: Index) -> set[int]:
    """Constants by which positions are divided."""
    return {
        node.operands[1].value
        for node in walk(relation)
        if isinstance(node, Arith) and node.op in ("floordiv", "mod")
        if isinstance(node.operands[1], Const) and node.operands[1].value > 1
    }


def _grid(problem: CoverProblem, tile: int) -> TileGrid:
    """Key tiles start so that the relation's diagonal, where it has one, runs through tile corners."""
    shift = _diagonal(problem.relation)
    origin = -((-shift) % tile)
    return TileGrid(problem.n_q, problem.n_k, tile, tile, origin)


def _diagonal(relation: Index) -> int:
    """The c of a comparison `q + c >= k`, which causal relations have; 0 where there is none."""
    shifts = []
    for node in walk(relation):
        if isinstance(node, Compare) and isinstance(node.value, Linear) and len(node.value.terms) == 2:
            terms = {t.name: c for t, c in node.value.terms if isinstance(t, Position)}
            if terms == {"q": 1, "k": -1}:
                shifts.append(node.value.constant)
    return min(shifts, key=abs, default=0)


def dense_choice(problem: CoverProblem) -> CoverChoice:
    """No tiles: row blocks whose masks are evaluated as they run."""
    rows = max(32, min(EXACT_ROWS, EXACT_ELEMENTS // max(problem.n_k, 1)))
    grid = TileGrid(problem.n_q, problem.n_k, rows, max(rows, EXACT_ROWS))
    try:
        found = dense_cover(grid, find_live_tiles(problem.relation, grid))
    except TooManyTilesError:
        found = dense_cover(grid, None)
    reason = (
        f"blocks of {rows} rows against the keys between their first and last live tile, masks evaluated as they run"
    )
    return CoverChoice(found, grid, _cost(problem, found), "dense by row blocks", (reason,))


def _cost(problem: CoverProblem, found: Cover) -> float:
    work = problem.work
    triangular = {i for i, mask in enumerate(found.masks) if mask.is_triangular}
    alike = Counter((piece.queries.axes, piece.keys.axes, piece.mask, piece.fresh) for piece in found.pieces)
    cost = 0.0
    for (queries, keys, mask, fresh), count in alike.items():  # where a piece begins does not matter
        piece = PlanPiece(Strip(0, queries), Strip(0, keys), mask, fresh)
        cost += count * problem.rates.piece(piece, work, mask in triangular)
    return cost


def _compared(other: CoverChoice, best: CoverChoice) -> str:
    times = other.cost / max(best.cost, 1.0)
    return f"{other.schedule} at {other.grid.q_tile}×{other.grid.k_tile}: {times:.2f} × the estimated time"


def _described(found: Cover, grid: TileGrid) -> str:
    masks = f", {len(found.masks)} shared mask{'s' if len(found.masks) != 1 else ''}" if found.masks else ""
    pieces = f"{len(found.pieces)} piece{'s' if len(found.pieces) != 1 else ''}"
    evaluated = sum(piece.queries.count for piece in found.pieces if piece.mask == "exact")
    exact = f", {evaluated} calls with masks evaluated as they run" if evaluated else ""
    return f"{pieces} on tiles of {grid.q_tile}×{grid.k_tile}{masks}{exact}"


def _why(refusal: Exception) -> str:
    if isinstance(refusal, TooManyTilesError):
        return "nearly every tile is undecided"
    return "the partial tiles are too unlike each other to share masks"
