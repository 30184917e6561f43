"""Full parts of masked pieces apart: still the relation, once, with fewer masked elements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnc.compiler import fold
from attnc.compiler.analysis import exact
from attnc.compiler.analysis.grid import Grid
from attnc.compiler.ir import Index
from attnc.compiler.planning.pieces import Cover, cover
from attnc.compiler.planning.plan import GridMask, Piece, stretch
from attnc.compiler.planning.splitting import split_full_parts
from plan_checks import check_pieces

Q, K = fold.place("q"), fold.place("k")
GAP = fold.sub(Q, K)


def window(width: int) -> Index:
    return fold.conjunction(fold.less_equal(fold.const(0), GAP), fold.less(GAP, fold.const(width)))


def masked(found: Cover) -> int:
    return sum(p.elements for p in found.pieces if isinstance(p.mask, int))


@given(st.integers(2, 150), st.integers(1, 400), st.sampled_from([8, 16, 32]))
def test_parts_are_the_relation(width: int, n: int, tile: int) -> None:
    relation = window(width)
    found = cover(relation, Grid(n, n, tile, tile), {})
    apart = split_full_parts(found)
    if apart is not None:
        check_pieces(apart.pieces, apart.masks, exact.mask(relation, (0, n), (0, n)))
        assert masked(apart) < masked(found)
        assert (apart.visible, apart.full_tiles, apart.partial_tiles) == (
            found.visible,
            found.full_tiles,
            found.partial_tiles,
        )


def test_a_wide_window_has_a_full_middle() -> None:
    found = cover(window(512), Grid(4096, 4096, 64, 64), {})
    apart = split_full_parts(found)
    assert apart is not None
    assert {p.mask for p in apart.pieces if p.fresh} <= {"full", "causal"}
    assert any(p.mask == "causal" and not p.fresh for p in apart.pieces)
    assert masked(apart) < masked(found) / 4


@pytest.mark.parametrize("width", [2, 40])
def test_what_has_no_full_middle_stays(width: int) -> None:
    assert split_full_parts(cover(window(width), Grid(1024, 1024, 64, 64), {})) is None


def test_masks_of_bricks_stay() -> None:
    bricks = GridMask((np.eye(2, dtype=np.bool_), np.ones((2, 2), dtype=np.bool_)))
    piece = Piece(stretch(0, 4), stretch(0, 4), 0)
    assert split_full_parts(Cover((piece,), (bricks,), 0, 1, 8)) is None
