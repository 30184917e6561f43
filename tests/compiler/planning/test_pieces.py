"""Pieces equal the relation: every visible pair once and no other pair; rows are written before they are merged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import expression_trees as trees
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.ir import Index, fold
from attnc.compiler.planning.pieces import cover, dense_cover
from attnc.spec.errors import EvaluationError
from expression_trees import Tree
from plan_checks import check_pieces
from relations import relations
from tiers import examples

Q, K = fold.place("q"), fold.place("k")


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    sizes = st.one_of(st.integers(1, 300), st.sampled_from([1, 31, 64, 65, 127, 128, 129, 256]))
    k_tile = draw(st.sampled_from([8, 13, 16, 32, 64]))
    q_tile = k_tile if draw(st.integers(0, 3)) else draw(st.sampled_from([8, 16, 24, 64]))
    origin = -draw(st.integers(0, k_tile - 1)) if draw(st.booleans()) else 0
    return TileGrid(draw(sizes), draw(sizes), q_tile, k_tile, origin)


def check(relation: Index, grid: TileGrid) -> None:
    try:
        mask = exact_evaluation.mask(relation, (0, grid.n_q), (0, grid.n_k))
    except EvaluationError:
        assume(False)
        raise
    tiled = cover(relation, grid, {})
    check_pieces(tiled.pieces, tiled.masks, mask)
    assert tiled.visible == mask.sum()
    dense = dense_cover(grid, find_live_tiles(relation, grid))
    check_pieces(dense.pieces, (), mask)


@settings(max_examples=examples(150))
@given(relations(), grids())
def test_pieces(tree: Tree, grid: TileGrid) -> None:
    check(trees.build(tree), grid)


BAND = fold.less_equal(
    fold.absolute(fold.sub(fold.floordiv(Q, fold.const(8)), fold.floordiv(K, fold.const(8)))), fold.const(1)
)
CORNERS = fold.less_equal(fold.mod(K, fold.const(8)), fold.mod(Q, fold.const(8)))
EVERY_OTHER = fold.equal(fold.mod(fold.floordiv(K, fold.const(8)), fold.const(2)), fold.const(0))


@pytest.mark.parametrize(
    "grid", [TileGrid(60, 60, 8, 8), TileGrid(64, 61, 8, 8), TileGrid(61, 64, 8, 8, -3), TileGrid(64, 29, 8, 8, -5)]
)
@pytest.mark.parametrize(
    "relation",
    [BAND, EVERY_OTHER, fold.conjunction(CORNERS, EVERY_OTHER), CORNERS],
    ids=["full tiles up to a ragged edge", "equal runs in one row", "several diagonals in a row", "all diagonal"],
)
def test_runs_that_look_alike(relation: Index, grid: TileGrid) -> None:
    check(relation, grid)


def test_a_window_takes_few_pieces() -> None:
    gap = fold.sub(Q, K)
    window = fold.conjunction(fold.less_equal(fold.const(0), gap), fold.less(gap, fold.const(300)))
    tiled = cover(window, TileGrid(4096, 4096, 64, 64), {})
    assert len(tiled.pieces) <= 8
    causal = cover(fold.less_equal(K, Q), TileGrid(4096, 4096, 64, 64), {})
    assert [(p.mask, p.queries.length) for p in causal.pieces] == [("causal", 4096)]


def test_a_diagonal_off_the_corner() -> None:
    """Key tiles aligned to the diagonal make the last queries of a longer key list one triangle."""
    relation = fold.less_equal(K, fold.add(Q, fold.const(37)))
    tiled = cover(relation, TileGrid(100, 137, 16, 16, -(-37 % 16)), {})
    assert {p.mask for p in tiled.pieces} == {"causal", "full"}
    check_pieces(tiled.pieces, tiled.masks, np.tri(100, 137, 37, dtype=np.bool_))


def test_equal_row_blocks_at_even_steps_are_one_piece() -> None:
    pieces = dense_cover(TileGrid(1000, 700, 16, 16), None).pieces
    assert [(p.queries.count, p.queries.length, p.keys.length) for p in pieces] == [(1, 8, 700), (62, 16, 700)]
    band = fold.less(fold.absolute(fold.sub(Q, K)), fold.const(5))
    grid = TileGrid(4096, 4096, 16, 16)
    tiles = find_live_tiles(band, grid)
    pieces = dense_cover(grid, tiles).pieces
    assert sorted((p.queries.count, p.keys.length) for p in pieces) == [(2, 32), (254, 48)]
