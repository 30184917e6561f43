"""Choose the cover of a specialised relation: build candidates, cost them and compare them.

Visible pairs that the tiles of a plan leave uncounted are counted exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import gcd
from typing import Literal

from attnc.compiler.analysis.grid import TileGrid
from attnc.compiler.analysis.live_tiles import TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Arith, Compare, Const, Index, Linear, Position
from attnc.compiler.ir.aggregates import TooManyStepsError
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.planning.cpu_plan import PlanPiece, Strip
from attnc.compiler.planning.formulas import closed_cover
from attnc.compiler.planning.grids import SolvedCover, cover_by_grid, reads_coordinates
from attnc.compiler.planning.pieces import Cover, CoverSum, cover, dense_cover
from attnc.compiler.planning.rates import PieceWork, Rates
from attnc.compiler.planning.residues import Residue, residues, split
from attnc.compiler.planning.runs import TooManyClassesError, resolve
from attnc.compiler.planning.splitting import split_full_parts, split_triangles
from attnc.spec.source import Span

MAX_PIECES = 4096
"""Maximum number of pieces of a cover; one with more is discarded."""

EXACT_ROWS = 512
EXACT_ELEMENTS = 1 << 23
"""Maximum number of mask elements of a dense row block."""

LARGE = 1 << 28
"""Number of pairs above which the first cover by tiles that succeeds is taken."""

LONG = 2_000
"""Number of nodes of a relation above which the first cover by tiles is taken.

Every further tile size costs about one second of planning for 4,000 nodes.
"""

SMALL = 1 << 20
"""Maximum number of pairs for which a single masked call is tried."""


@dataclass(frozen=True)
class CoverProblem:
    """A relation over local rows and keys, with the sizes and rates from which its pieces are costed.

    `copies`: the number of equal problems that this one represents.
    """

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
        """The size of a piece, for the cost model."""
        nodes = sum(1 for _ in walk(self.relation))
        return PieceWork(self.dtype, self.head_dim, self.lanes, nodes, self.copies)

    @property
    def masked_element(self) -> float:
        """Nanoseconds of one pair in dense row blocks, including the evaluation of its mask."""
        work = self.work
        return self.rates.element(self.dtype, EXACT_ROWS, self.head_dim) * self.lanes + work.nodes * self.rates.evaluate


@dataclass(frozen=True, slots=True)
class CoverChoice:
    """The chosen cover, its grid, its cost in nanoseconds, and the reasons against the other covers.

    `total`: tiles that dense attention would compute, if they are not the tiles of `grid`.
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
        """Whether the pieces may be moved to every n-th token; masks evaluated at run time need adjacent tokens."""
        return self.schedule == "pieces" and not any(piece.mask == "exact" for piece in self.cover.pieces)

    @property
    def tiles(self) -> int:
        """Tiles that dense attention would compute."""
        return self.grid.rows * self.grid.columns if self.total is None else self.total


def choose(problem: CoverProblem) -> CoverChoice:
    """Return the cheapest cover by the cost model; a cover by formula is taken without comparison."""
    closed = by_formula(problem)
    if closed is not None:
        return with_cheap_halves(problem, closed)
    tried: list[CoverChoice] = []
    bricks = by_grid(problem)
    if bricks is not None:
        tried.append(bricks)
        small = problem.n_q * problem.n_k <= SMALL  # then a single masked call is tried, too
        if not small and bricks.cost <= _dense_cost(problem) / 2:  # then natural order cannot win
            return bricks
    classes = by_residues(problem)
    if classes is not None:
        tried.append(classes)
        if _near_bound(problem, tried):  # in natural order every tile meets a class
            return classes
    return _natural(problem, tried)


def by_formula(problem: CoverProblem) -> CoverChoice | None:
    """Return the cover by a formula, without visiting a tile; None where no formula covers the relation."""
    grid = _grid(problem, tile_sizes(problem)[0])
    closed = closed_cover(problem.relation, grid)
    if closed is None:
        return None
    reason = f"{_description(closed, grid)}, by formula"
    return CoverChoice(closed, grid, _cost(problem, closed), "pieces", (reason,))


def by_tiles(problem: CoverProblem, tile: int, notes: list[str]) -> list[CoverChoice]:
    """Return covers in natural order by tiles of one size; the reason for finding none is appended to `notes`."""
    grid = _grid(problem, tile)
    try:
        tiled = cover(problem.relation, grid, problem.origins)
    except (TooManyTilesError, TooManyClassesError) as refusal:
        notes.append(f"tiles of {tile}: {_refusal_reason(refusal)}")
        return []
    if len(tiled.pieces) > MAX_PIECES:
        notes.append(f"tiles of {tile}: {len(tiled.pieces)} pieces, more than {MAX_PIECES}")
        return []
    choices = [CoverChoice(tiled, grid, _cost(problem, tiled), "pieces", (_description(tiled, grid),))]
    split_cover = None if problem.n_q * problem.n_k > LARGE else split_full_parts(tiled)
    if split_cover is not None:
        reason = f"{_description(split_cover, grid)}, full parts apart"
        choices.append(CoverChoice(split_cover, grid, _cost(problem, split_cover), "pieces", (reason,)))
    return choices


def _natural(problem: CoverProblem, tried: list[CoverChoice]) -> CoverChoice:
    """Return the cheapest of the covers tried so far and the covers in natural order."""
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
    best = with_cheap_halves(problem, min(tried, key=lambda choice: choice.cost))
    reasons = tuple(_comparison(other, best) for other in tried if other.cost > best.cost)
    return CoverChoice(best.cover, best.grid, best.cost, best.schedule, best.reasons + reasons + tuple(notes), fallback)


WORTH = 0.97
"""A cover with more pieces is taken only if its cost is below this share of the other cover's cost."""


def with_cheap_halves(problem: CoverProblem, choice: CoverChoice) -> CoverChoice:
    """Return the choice with short triangles split in halves if that is noticeably cheaper, else the choice itself."""
    halves = with_halves(problem, choice)
    return choice if halves is None or halves.cost >= WORTH * choice.cost else halves


def with_halves(problem: CoverProblem, choice: CoverChoice) -> CoverChoice | None:
    """Return the choice with short triangles split in halves; None if it has no short triangles."""
    halves = split_triangles(choice.cover)
    if halves is None:
        return None
    reason = f"{_description(halves, choice.grid)}, triangles in halves"
    return replace(choice, cover=halves, cost=_cost(problem, halves), reasons=(reason,))


NEAR = 4.0
"""Residue classes are taken without comparison if they cost at most this multiple of the visible pairs alone."""


def _beats_dense(problem: CoverProblem, tried: list[CoverChoice]) -> bool:
    """Whether a cover costs less than dense row blocks would even if they computed only the visible pairs."""
    rate = problem.masked_element * problem.copies
    return any(c.cover.visible is not None and c.cost <= c.cover.visible * rate for c in tried)


def _near_bound(problem: CoverProblem, tried: list[CoverChoice]) -> bool:
    """Whether a cover costs at most `NEAR` times as much as the visible pairs alone in one call."""
    rates = problem.rates
    rate = rates.element(problem.dtype, EXACT_ROWS, problem.head_dim) * problem.lanes * problem.copies
    return any(c.cover.visible is not None and c.cost <= NEAR * (c.cover.visible * rate + rates.call) for c in tried)


def by_residues(problem: CoverProblem) -> CoverChoice | None:
    """Return a cover whose parts with a congruence are covered by residue classes; None without a congruence."""
    parts = split(problem.relation)
    if all(part.congruence is None for part in parts):
        return None
    cover_sum = CoverSum()
    for part in parts:
        if part.congruence is None:
            part_choice = choose(replace(problem, relation=part.relation))
            if not part_choice.can_be_spread:
                return None
            cover_sum.add(part_choice.cover, lambda piece: piece)
            continue
        class_choices: dict[tuple[Index, int, int], CoverChoice] = {}
        for residue in residues(part, problem.n_q, problem.n_k):
            key = (residue.relation, residue.n_q, residue.n_k)
            if key not in class_choices:
                class_choices[key] = choose(_class_problem(problem, residue))
            if not class_choices[key].can_be_spread:
                return None
            cover_sum.add(class_choices[key].cover, partial(residue.placed, fresh=len(parts) == 1))
    class_cover = cover_sum.cover()
    if len(class_cover.pieces) > MAX_PIECES:
        return None
    tile = tile_sizes(problem)[0]
    divisors = ", ".join(str(part.congruence.divisor) for part in parts if part.congruence is not None)
    reason = f"{_description(class_cover, _grid(problem, tile))}; residue classes modulo {divisors}"
    return CoverChoice(class_cover, _grid(problem, tile), _cost(problem, class_cover), "pieces", (reason,))


def by_grid(problem: CoverProblem, rank: int = 0) -> CoverChoice | None:
    """Return a cover by bricks of the grid whose coordinates the relation reads.

    None if the relation reads no coordinates or does not separate by axis. `rank`: the bricks to take, 0 for the best.
    """
    if not reads_coordinates(problem.relation):
        return None

    def solve(relation: Index, n_q: int, n_k: int) -> SolvedCover | None:
        choice = choose(replace(problem, relation=relation, n_q=n_q, n_k=n_k))
        if not choice.can_be_spread:
            return None
        return SolvedCover(choice.cover, choice.grid.q_tile, choice.tiles, choice.cost)

    work = replace(problem.work, lanes=problem.lanes * problem.copies, copies=1)
    brick_cover = cover_by_grid(problem.relation, problem.n_q, problem.n_k, problem.rates, work, solve, rank)
    if brick_cover is None or len(brick_cover.cover.pieces) > MAX_PIECES:
        return None
    grid = _grid(problem, brick_cover.tile)
    sizes = ", ".join("×".join(map(str, brick)) for brick in brick_cover.bricks[:4])
    other_sizes = f" and {len(brick_cover.bricks) - 4} other sizes" if len(brick_cover.bricks) > 4 else ""
    reason = f"{_description(brick_cover.cover, grid)}; bricks of {sizes}{other_sizes} tokens"
    return CoverChoice(brick_cover.cover, grid, brick_cover.cost, "pieces", (reason,), total=brick_cover.total)


def _dense_cost(problem: CoverProblem) -> float:
    """Return the nanoseconds of computing every pair, each with its mask evaluated."""
    return problem.n_q * problem.n_k * problem.masked_element * problem.copies


def _class_problem(problem: CoverProblem, residue: Residue) -> CoverProblem:
    """Return the problem of one residue class; all classes of the divisor count as its copies."""
    copies = problem.copies * residue.divisor
    return replace(problem, relation=residue.relation, n_q=residue.n_q, n_k=residue.n_k, copies=copies)


def tile_sizes(problem: CoverProblem) -> tuple[int, ...]:
    """Tile sizes to try: sizes that suit the kernel, multiples of the relation's blocks, and one tile of everything."""
    kernel_sizes = (256, 128, 64) if problem.dtype in ("bfloat16", "float16") else (128, 64, 256)
    multiples = [block * max(1, kernel_sizes[0] // block) for block in sorted(blocks(problem.relation))]
    whole_size = [max(problem.n_q, problem.n_k, 1)] if problem.n_q * problem.n_k <= SMALL else []
    block_sizes = [multiple for multiple in multiples if multiple <= 2048][:2]
    large = problem.n_q * problem.n_k > LARGE  # then the first size that works is taken
    return tuple(dict.fromkeys([*block_sizes, *kernel_sizes] if large else [*kernel_sizes, *block_sizes, *whole_size]))


def blocks(relation: Index) -> set[int]:
    """Return the constants by which the relation divides positions."""
    return {
        node.operands[1].value
        for node in walk(relation)
        if isinstance(node, Arith) and node.op in ("floordiv", "mod")
        if isinstance(node.operands[1], Const) and node.operands[1].value > 1
    }


def _grid(problem: CoverProblem, tile: int) -> TileGrid:
    """Return a grid whose key tiles start so that the relation's diagonal, if any, runs through tile corners."""
    shift = _diagonal(problem.relation)
    origin = -((-shift) % tile)
    return TileGrid(problem.n_q, problem.n_k, tile, tile, origin)


def _diagonal(relation: Index) -> int:
    """Return the c of a comparison `q + c >= k`, which causal relations contain; 0 if there is no such comparison."""
    shifts = []
    for node in walk(relation):
        if isinstance(node, Compare) and isinstance(node.value, Linear) and len(node.value.terms) == 2:
            terms = {t.name: c for t, c in node.value.terms if isinstance(t, Position)}
            if terms == {"q": 1, "k": -1}:
                shifts.append(node.value.constant)
    return min(shifts, key=abs, default=0)


def dense_choice(problem: CoverProblem) -> CoverChoice:
    """Return a cover without tiles: row blocks whose masks are evaluated as they run."""
    rows = max(32, min(EXACT_ROWS, EXACT_ELEMENTS // max(problem.n_k, 1)))
    grid = TileGrid(problem.n_q, problem.n_k, rows, max(rows, EXACT_ROWS))
    try:
        dense = dense_cover(grid, find_live_tiles(problem.relation, grid))
    except TooManyTilesError:
        dense = dense_cover(grid, None)
    reason = (
        f"blocks of {rows} rows against the keys between their first and last live tile, masks evaluated as they run"
    )
    return CoverChoice(dense, grid, _cost(problem, dense), "dense by row blocks", (reason,))


def _cost(problem: CoverProblem, taken: Cover) -> float:
    """Return the nanoseconds of all pieces of a cover."""
    work = problem.work
    triangular = {i for i, mask in enumerate(taken.masks) if mask.is_triangular}
    equal_pieces = Counter((piece.queries.axes, piece.keys.axes, piece.mask, piece.fresh) for piece in taken.pieces)
    cost = 0.0
    for (queries, keys, mask, fresh), count in equal_pieces.items():  # equal wherever a piece begins
        piece = PlanPiece(Strip(0, queries), Strip(0, keys), mask, fresh)
        cost += count * problem.rates.piece(piece, work, mask in triangular)
    return cost


def _comparison(other: CoverChoice, best: CoverChoice) -> str:
    times = other.cost / max(best.cost, 1.0)
    return f"{other.schedule} at {other.grid.q_tile}×{other.grid.k_tile}: {times:.2f} × the estimated time"


def _description(taken: Cover, grid: TileGrid) -> str:
    masks = f", {len(taken.masks)} shared mask{'s' if len(taken.masks) != 1 else ''}" if taken.masks else ""
    pieces = f"{len(taken.pieces)} piece{'s' if len(taken.pieces) != 1 else ''}"
    evaluated = sum(piece.queries.count for piece in taken.pieces if piece.mask == "exact")
    exact = f", {evaluated} calls with masks evaluated as they run" if evaluated else ""
    return f"{pieces} on tiles of {grid.q_tile}×{grid.k_tile}{masks}{exact}"


def _refusal_reason(refusal: Exception) -> str:
    if isinstance(refusal, TooManyTilesError):
        return "the analysis leaves nearly every tile undecided"
    return "the partial tiles are too different to share masks"


TILES = range(16, 257)
"""Sides of tiles that may be used for counting."""

MOST_TILES = 1 << 19
"""Maximum number of tiles that counting visits on one level."""

MOST_CLASS_ELEMENTS = 1 << 24
"""Maximum number of mask elements that counting evaluates."""


def visible_pairs(relation: Index, n_q: int, n_k: int, origins: Mapping[Index, Span]) -> int | None:
    """Count the visible pairs of a relation; None where counting would take long.

    Where the side of the tiles divides the constants by which the relation divides positions, steps of the relation
    meet tiles in their corners only. Then few classes of tiles differ, and one tile of each class is counted.
    """
    for side in _sides(relation):
        grid = TileGrid(n_q, n_k, side, side)
        try:
            tiles = find_live_tiles(relation, grid, MOST_TILES)
            return resolve(relation, tiles, origins, most_elements=MOST_CLASS_ELEMENTS).visible
        except (TooManyTilesError, TooManyClassesError, TooManyStepsError):
            continue
    return None


def _sides(relation: Index) -> list[int]:
    """Return the sides of tiles to try: the largest divisors of the relation's divisors, jointly and one by one."""
    periods = sorted((n for n in blocks(relation) if n >= TILES.start), reverse=True)
    common = [gcd(*periods)] if periods else []
    sides = [max((side for side in TILES if n % side == 0), default=0) for n in (*common, *periods)]
    return list(dict.fromkeys(side for side in sides if side))[:2]
