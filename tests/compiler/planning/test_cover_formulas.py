"""Covers by formula equal the covers that tiles give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.ir import Index, fold
from attnc.compiler.planning.formulas import closed_cover, diagonal_shift
from attnc.compiler.planning.pieces import cover
from plan_checks import check_pieces
from tiers import examples

Q, K = fold.place("q"), fold.place("k")


def half_plane(shift: int) -> Index:
    return fold.less_equal(K, fold.add(Q, fold.const(shift)))


@settings(max_examples=examples(150))
@given(
    st.integers(-320, 320),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([8, 13, 32, 64]),
    st.sampled_from([8, 13, 64]),
)
def test_half_planes(shift: int, n_q: int, n_k: int, tile: int, k_tile: int) -> None:
    relation = half_plane(shift)
    grid = TileGrid(n_q, n_k, tile, k_tile, -((-shift) % k_tile))
    closed, found = closed_cover(relation, grid), cover(relation, grid, {})
    assert closed is not None
    check_pieces(closed.pieces, (), np.tri(n_q, n_k, shift, dtype=np.bool_))
    assert (closed.visible, closed.full_tiles, closed.partial_tiles) == (
        found.visible,
        found.full_tiles,
        found.partial_tiles,
    )
    assert len(closed.pieces) <= 3


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 0), (0, 5), (5, 0), (1, 1), (7, 9)])
@pytest.mark.parametrize(
    "relation", [fold.truth(True), fold.truth(False), half_plane(0), half_plane(3), half_plane(-20)]
)
def test_few_or_no_tokens(relation: Index, n_q: int, n_k: int) -> None:
    closed = closed_cover(relation, TileGrid(n_q, n_k, 8, 8))
    assert closed is not None
    mask = exact_evaluation.mask(relation, (0, n_q), (0, n_k))
    check_pieces(closed.pieces, (), mask)
    assert closed.visible == mask.sum()


def test_other_relations_have_no_formula() -> None:
    for relation in (
        fold.equal(Q, K),
        fold.less_equal(Q, K),
        fold.less_equal(K, fold.const(3)),
        fold.less_equal(fold.times(K, 2), Q),
        fold.conjunction(half_plane(0), half_plane(-3), fold.zero(Q)),
    ):
        assert closed_cover(relation, TileGrid(16, 16, 8, 8)) is None
    assert diagonal_shift(half_plane(-7)) == -7
