"""Live tiles by rows and by columns, in every order of tokens, against the relation token by token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.grid import TileGrid
from attnc.compiler.ir import Index, fold
from attnc.compiler.planning.brick_work import BrickFinder
from attnc.compiler.planning.tile_work import NATURAL, Strips, TileWork, strips, together
from attnc.compiler.simulation.natural_tiles import count_shifted, find_repetition
from attnc.compiler.simulation.orders import TileFinder
from attnc.spec.errors import EvaluationError
from expression_trees import Tree, build
from grid_relations import K, Q, coordinate, grids, near, truth
from relations import relations
from tiers import examples

Matrix = NDArray[np.bool_]
Counts = list[tuple[int, int]]


def in_rows(mask: Matrix, rows: list[NDArray[np.int64]], columns: list[NDArray[np.int64]]) -> tuple[Counts, Counts]:
    """Count full and partial tiles of every tile row and tile column that has any, sorted by size."""
    seen = np.array([[mask[np.ix_(r, c)].sum() for c in columns] for r in rows]).reshape(len(rows), len(columns))
    area = np.multiply.outer([len(r) for r in rows], [len(c) for c in columns])
    full, partial = (seen == area) & (area > 0), (seen > 0) & (seen < area)
    pairs_by_axis = [list(zip(full.sum(axis).tolist(), partial.sum(axis).tolist(), strict=True)) for axis in (1, 0)]
    by_row, by_column = (sorted(pair for pair in pairs if sum(pair)) for pairs in pairs_by_axis)
    return by_row, by_column


def listed(tile_strips: Strips) -> Counts:
    pairs = zip(tile_strips.full.tolist(), tile_strips.partial.tolist(), tile_strips.times.tolist(), strict=True)
    return sorted(itertools.chain.from_iterable([(full, partial)] * times for full, partial, times in pairs))


def check(work: TileWork, mask: Matrix, rows: list[NDArray[np.int64]], columns: list[NDArray[np.int64]]) -> None:
    by_row, by_column = in_rows(mask, rows, columns)
    assert listed(work.rows) == by_row
    assert listed(work.columns) == by_column
    assert work.visible == mask.sum()
    assert work.rows.live == work.columns.live == sum(map(sum, by_row))
    assert work.rows.count == len(by_row)


def stretches_of(n: int, tile: int) -> list[NDArray[np.int64]]:
    return [np.arange(i, min(i + tile, n)) for i in range(0, n, tile)]


@settings(max_examples=examples(200))
@given(
    relations(), st.integers(1, 150), st.integers(1, 150), st.sampled_from([8, 16, 32]), st.sampled_from([8, 16, 64])
)
def test_natural_order(relation: Tree, n_q: int, n_k: int, q_tile: int, k_tile: int) -> None:
    node = build(relation)
    try:
        mask = exact_evaluation.mask(node, (0, n_q), (0, n_k))
    except EvaluationError:
        assume(False)
        raise
    work = TileFinder(node, n_q, n_k, {}).natural(q_tile, k_tile)
    assert work.order is NATURAL
    check(work, mask, stretches_of(n_q, q_tile), stretches_of(n_k, k_tile))


def classes_of(n: int, divisor: int, tile: int) -> list[NDArray[np.int64]]:
    return [part * divisor + r for r in range(min(divisor, n)) for part in stretches_of(-(-(n - r) // divisor), tile)]


@settings(max_examples=examples(100))
@given(st.integers(2, 9), st.integers(0, 8), st.integers(1, 90), st.integers(1, 130), st.sampled_from([8, 16]))
def test_one_congruence_by_classes(divisor: int, offset: int, window: int, n: int, tile: int) -> None:
    gap = fold.sub(Q, K)
    own = fold.conjunction(
        fold.equal(fold.mod(gap, fold.const(divisor)), fold.const(offset % divisor)),
        fold.less_equal(K, Q),
        fold.less(gap, fold.const(window)),
    )
    finder = TileFinder(own, n, n, {})
    assume(finder.divisors)
    work = finder.by_residues(tile, tile)
    mask = exact_evaluation.mask(own, (0, n), (0, n))
    blocks = classes_of(n, divisor, tile)
    check(work, mask, blocks, blocks)
    assert work.merged == 0


@settings(max_examples=examples(60))
@given(st.integers(2, 9), st.integers(1, 12), st.integers(1, 130))
def test_a_congruence_beside_a_window(divisor: int, local: int, n: int) -> None:
    """Two walks: the window in natural order, the rest by residue classes; every visible pair is in exactly one."""
    gap = fold.sub(Q, K)
    strided = fold.equal(fold.mod(gap, fold.const(divisor)), fold.const(0))
    own = fold.conjunction(fold.less_equal(K, Q), fold.disjunction(fold.less(gap, fold.const(local)), strided))
    finder = TileFinder(own, n, n, {})
    assume(finder.divisors)
    work = finder.by_residues(8, 8)
    mask = exact_evaluation.mask(own, (0, n), (0, n))
    i, j = np.indices(mask.shape)
    inside = mask & (i - j < local)
    blocks = classes_of(n, divisor, 8)
    natural, classed = (
        in_rows(inside, stretches_of(n, 8), stretches_of(n, 8))[0],
        in_rows(mask & ~inside, blocks, blocks)[0],
    )
    assert listed(work.rows) == sorted(natural + classed)
    assert work.visible == mask.sum()
    assert work.merged == n


def bricks_of(extents: tuple[int, ...], sides: tuple[int, ...]) -> list[NDArray[np.int64]]:
    tokens = np.arange(int(np.prod(extents))).reshape(extents)
    starts = [range(0, extent, side) for extent, side in zip(extents, sides, strict=True)]
    return [
        tokens[tuple(slice(a, a + side) for a, side in zip(corner, sides, strict=True))].ravel()
        for corner in itertools.product(*starts)
    ]


@settings(max_examples=examples(200))
@given(grids(), st.data())
def test_bricks(drawn: tuple[tuple[int, ...], Index], data: st.DataObject) -> None:
    extents, relation = drawn
    n = int(np.prod(extents))
    finder = TileFinder(relation, n, n, {}).bricks
    assume(finder is not None and finder.axes == extents)
    assert finder is not None
    q_brick, k_brick = (data.draw(st.sampled_from(finder.shapes(tile))) for tile in (8, 4))
    check(finder.work(q_brick, k_brick), truth(relation, n), bricks_of(extents, q_brick), bricks_of(extents, k_brick))


def window(extents: tuple[int, ...], reach: int) -> BrickFinder:
    parts = [near(coordinate(Q, extents, i), coordinate(K, extents, i), reach) for i in range(len(extents))]
    n = int(np.prod(extents))
    finder = TileFinder(fold.conjunction(*parts), n, n, {}).bricks
    assert finder is not None
    return finder


def test_every_factorisation_is_tried() -> None:
    finder = window((8, 8, 8), 1)
    assert len(finder.shapes(64)) == 10  # 2^a · 2^b · 2^c = 64 with no side beyond 8
    assert len(finder.best(64, 8)) == 10 * 10
    assert all(np.prod(shape) == 64 and max(shape) <= 64 for shape in finder.shapes(64))


def test_the_chosen_bricks_are_optimal() -> None:
    finder = window((12, 10), 2)
    best = finder.best(16, 8)
    live = [finder.work(*shapes).rows.live for shapes in best]
    assert live == sorted(live)
    assert live[0] < live[-1]


def test_a_sequence_has_no_bricks_and_no_classes() -> None:
    finder = TileFinder(fold.less_equal(K, Q), 64, 64, {})
    assert finder.bricks is None
    assert finder.divisors == ()


def test_strips_that_are_alike_are_counted() -> None:
    joined_strips = strips(np.array([2, 0, 2, 0]), np.array([1, 0, 1, 3]))
    assert listed(joined_strips) == [(0, 3), (2, 1), (2, 1)]
    assert (joined_strips.count, joined_strips.full_tiles, joined_strips.partial_tiles, joined_strips.live) == (
        3,
        4,
        5,
        9,
    )
    assert listed(together([joined_strips, joined_strips.repeated(2)])) == sorted(listed(joined_strips) * 3)
    assert together([]).count == 0


@pytest.mark.parametrize("n", [1, 7, 64, 65])
def test_nothing_visible(n: int) -> None:
    work = TileFinder(fold.less(Q, fold.const(0)), n, n, {}).natural(16, 16)
    assert (work.rows.live, work.columns.live, work.visible) == (0, 0, 0)


@st.composite
def shifted(draw: st.DrawFn) -> tuple[Index, TileGrid]:
    """Draw a relation that is invariant under a shift of both positions, and a grid of whole tiles."""
    gap, step = fold.sub(Q, K), draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    blocks = fold.sub(fold.floordiv(Q, fold.const(step)), fold.floordiv(K, fold.const(step)))
    kinds = [
        fold.less_equal(K, Q),
        fold.less(fold.absolute(gap), fold.const(draw(st.integers(1, 40)))),
        fold.equal(fold.mod(gap, fold.const(step)), fold.const(0)),
        fold.equal(fold.mod(K, fold.const(step)), fold.const(step - 1)),
        fold.less(fold.mod(Q, fold.const(step)), fold.const(2)),
        fold.equal(blocks, fold.const(draw(st.integers(-1, 2)))),
        fold.less(K, fold.const(draw(st.integers(1, 9)))),
        fold.less(Q, fold.const(draw(st.integers(1, 9)))),
    ]
    parts = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))
    join = draw(st.sampled_from([fold.conjunction, fold.disjunction]))
    tile = draw(st.sampled_from([4, 8]))
    return join(*parts), TileGrid(tile * draw(st.integers(1, 14)), tile * draw(st.integers(1, 14)), tile, tile)


@settings(max_examples=examples(200))
@given(shifted())
def test_repeating_rows_are_derived_from_a_few(drawn: tuple[Index, TileGrid]) -> None:
    relation, grid = drawn
    repetition = find_repetition(relation, grid)
    assume(repetition is not None)
    assert repetition is not None
    found = count_shifted(relation, grid, repetition, {})
    mask = exact_evaluation.mask(relation, (0, grid.n_q), (0, grid.n_k))
    tiles = mask.reshape(grid.rows, grid.q_tile, grid.columns, grid.k_tile).sum((1, 3))
    full, partial = tiles == grid.q_tile * grid.k_tile, (tiles > 0) & (tiles < grid.q_tile * grid.k_tile)
    assert [x.tolist() for x in found.by_row] == [full.sum(1).tolist(), partial.sum(1).tolist()]
    assert [x.tolist() for x in found.by_column] == [full.sum(0).tolist(), partial.sum(0).tolist()]
    assert found.visible == mask.sum()


@pytest.mark.parametrize(
    ("relation", "grid"),
    [
        (fold.less(K, fold.const(999)), TileGrid(1 << 14, 1 << 14, 8, 8)),  # too many columns differ from the rest
        (fold.less_equal(K, Q), TileGrid(64, 56, 8, 8)),  # fewer columns than rows
        (fold.less_equal(K, Q), TileGrid(63, 64, 8, 8)),  # ragged
        (fold.less_equal(K, Q), TileGrid(64, 64, 8, 16)),
        (fold.equal(fold.mod(K, fold.const(1021)), fold.const(0)), TileGrid(1 << 14, 1 << 14, 8, 8)),  # too late
    ],
)
def test_rows_that_do_not_repeat(relation: Index, grid: TileGrid) -> None:
    assert find_repetition(relation, grid) is None
