"""Relations over token grids, separated by axis, covered by bricks or cut at segments, always equal the relation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.separation import CoordinateLeaves, NotSeparableError, SeparatedAxis, grid_of, separate
from attnc.compiler.ir import Index, fold
from attnc.compiler.planning.bricks import AxisTable, choose_bricks
from attnc.compiler.planning.grids import GridCover, SolvedCover, cover_by_grid
from attnc.compiler.planning.rates import AMX, PieceWork
from attnc.compiler.planning.residues import split
from attnc.compiler.planning.schedule import CoverProblem, choose
from grid_relations import Extents, K, Q, coordinate, grids, near, truth
from plan_checks import check_pieces
from tiers import examples


@settings(max_examples=examples(150), deadline=None)
@given(grids())
def test_products_are_the_relation_once(drawn: tuple[Extents, Index]) -> None:
    extents, relation = drawn
    n = int(np.prod(extents))
    grid = grid_of(relation, n)
    assume(grid is not None)
    assert grid is not None
    assert np.prod([axis.extent for axis in grid]) == n
    times = np.zeros((n, n), dtype=np.int64)
    leaves = CoordinateLeaves(relation, grid)
    for product in separate(relation, leaves):
        matrix = np.ones((1, 1), dtype=np.bool_)
        for i, axis in enumerate(grid):
            alone = exact_evaluation.mask(leaves.alone(product[i], i), (0, axis.extent), (0, axis.extent))
            matrix = np.kron(matrix, alone)
        times += matrix
    assert (times == truth(relation, n)).all()


@settings(max_examples=examples(150), deadline=None)
@given(grids(), st.sampled_from(["float32", "bfloat16"]))
def test_bricks_cover_the_relation_once(drawn: tuple[Extents, Index], dtype: str) -> None:
    extents, relation = drawn
    n = int(np.prod(extents))
    choice = choose(CoverProblem(relation, n, n, dtype, 64, 2, {}, AMX))
    seen = truth(relation, n)
    if choice.schedule == "pieces":
        check_pieces(choice.cover.pieces, choice.cover.masks, seen)
        assert choice.cover.visible == seen.sum()


@settings(max_examples=examples(100), deadline=None)
@given(grids())
def test_partial_bricks_have_a_hidden_pair(drawn: tuple[Extents, Index]) -> None:
    """The count is taken from the matrix, brick by brick."""
    extents, relation = drawn
    n = int(np.prod(extents))
    grid = grid_of(relation, n)
    assume(grid is not None)
    assert grid is not None
    leaves = CoordinateLeaves(relation, grid)
    products = separate(relation, leaves)
    assume(len(products) == 1)
    alone = [leaves.alone(r, i) for i, r in enumerate(products[0])]
    assume(all(part.congruence is None for r in alone for part in split(r)))  # else tiles are those of a class
    bricks = choose_bricks(tables(products[0], leaves), AMX, PieceWork("float32", 64, 1, 8))
    seen = truth(relation, n)
    if bricks is None:
        assert not seen.any()
        return
    number = np.zeros(n, dtype=np.int64)  # the brick of every token
    for axis, tile in zip(grid, bricks.tiles, strict=True):
        coordinates = np.arange(n) // axis.stride % axis.extent
        number = number * -(-axis.extent // tile) + coordinates // tile
    size = int(number.max()) + 1
    full = partial = 0
    for i in range(size):
        for j in range(size):
            part = seen[np.ix_(number == i, number == j)]
            full += bool(part.all())
            partial += bool(part.any() and not part.all())
    assert (bricks.cover.full_tiles, bricks.cover.partial_tiles, bricks.total) == (full, partial, size * size)


def tables(product: tuple[Index, ...], leaves: CoordinateLeaves) -> list[AxisTable]:
    return [AxisTable(r, i, leaves, 1 << 16, lambda *_: None) for i, r in enumerate(product)]


def test_axes_that_are_not_read_are_found() -> None:
    extents = (3, 4, 5, 7)
    relation = near(coordinate(Q, extents, 2), coordinate(K, extents, 2), 1)
    assert grid_of(relation, 420) == (SeparatedAxis(12, 35), SeparatedAxis(5, 7), SeparatedAxis(7, 1))
    assert grid_of(near(coordinate(Q, extents, 0), coordinate(K, extents, 0), 1), 420) == (
        SeparatedAxis(3, 140),
        SeparatedAxis(140, 1),
    )
    assert grid_of(near(Q, K, 3), 420) is None
    assert grid_of(relation, 421) is None


def test_positions_beside_coordinates_do_not_separate() -> None:
    extents = (4, 6)
    relation = fold.conjunction(near(coordinate(Q, extents, 0), coordinate(K, extents, 0), 1), near(Q, K, 3))
    with pytest.raises(NotSeparableError):
        separate(relation, CoordinateLeaves(relation, (SeparatedAxis(4, 6), SeparatedAxis(6, 1))))


def test_a_ball_is_split_by_the_values_of_one_axis() -> None:
    extents = (6, 7, 8)
    gaps = [fold.sub(coordinate(Q, extents, i), coordinate(K, extents, i)) for i in range(3)]
    squares = fold.add(*(fold.mul(gap, gap) for gap in gaps))
    relation = fold.less_equal(squares, fold.const(9))
    choice = choose(CoverProblem(relation, 336, 336, "float32", 64, 1, {}, AMX))
    if choice.schedule == "pieces":
        check_pieces(choice.cover.pieces, choice.cover.masks, truth(relation, 336))
    assert (
        len(
            separate(
                relation, CoordinateLeaves(relation, (SeparatedAxis(6, 56), SeparatedAxis(7, 8), SeparatedAxis(8, 1)))
            )
        )
        > 3
    )


def solve(relation: Index, n_q: int, n_k: int) -> SolvedCover | None:
    choice = choose(CoverProblem(relation, n_q, n_k, "float32", 64, 1, {}, AMX))
    return (
        SolvedCover(choice.cover, choice.grid.q_tile, choice.tiles, choice.cost)
        if choice.schedule == "pieces"
        else None
    )


def covered(relation: Index, n: int) -> GridCover | None:
    return cover_by_grid(relation, n, n, AMX, PieceWork("float32", 64, 1, 8), solve)


@pytest.mark.parametrize("words", [1, 20, 64])
def test_text_after_a_video(words: int) -> None:
    extents = (4, 6, 8)
    n = 192 + words
    inside = [near(coordinate(Q, extents, i), coordinate(K, extents, i), 1) for i in (1, 2)]
    text = [fold.less_equal(fold.const(192), place) for place in (Q, K)]
    relation = fold.disjunction(*text, fold.conjunction(*inside))
    grid_cover = covered(relation, n)
    assert grid_cover is not None
    check_pieces(grid_cover.cover.pieces, grid_cover.cover.masks, truth(relation, n))
    assert grid_cover.cover.visible == truth(relation, n).sum()


def test_a_second_grid_after_the_first() -> None:
    """Coordinates count from a segment's first token."""
    inside = [near(coordinate(Q, (5, 6), i, 24), coordinate(K, (5, 6), i, 24), 1) for i in (0, 1)]
    first = [near(coordinate(Q, (4, 6), i), coordinate(K, (4, 6), i), 1) for i in (0, 1)]
    second = [fold.less_equal(fold.const(24), place) for place in (Q, K)]
    before = [fold.less(place, fold.const(24)) for place in (Q, K)]
    relation = fold.disjunction(fold.conjunction(*second, *inside), fold.conjunction(*before, *first))
    grid_cover = covered(relation, 54)
    assert grid_cover is not None
    check_pieces(grid_cover.cover.pieces, grid_cover.cover.masks, truth(relation, 54))


def test_a_long_axis_is_solved_like_a_sequence() -> None:
    extents = (3, 3000)
    relation = fold.conjunction(
        near(coordinate(Q, extents, 0), coordinate(K, extents, 0), 1),
        near(coordinate(Q, extents, 1), coordinate(K, extents, 1), 200),
    )
    grid_cover = covered(relation, 9000)
    assert grid_cover is not None
    in_one = 3 * 3 - 2
    along = sum(min(i + 200, 2999) - max(i - 200, 0) + 1 for i in range(3000))
    assert grid_cover.cover.visible == in_one * along
