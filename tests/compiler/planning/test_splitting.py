"""Full parts split off masked pieces: the pieces still equal the relation once, with fewer masked elements."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.grid import TileGrid
from attnc.compiler.ir import Index, fold
from attnc.compiler.planning.cpu_plan import GridMask, PlanPiece, stretch
from attnc.compiler.planning.pieces import Cover, cover
from attnc.compiler.planning.rates import KEY_BLOCK, computed
from attnc.compiler.planning.splitting import split_full_parts, split_triangles
from plan_checks import check_pieces

Q, K = fold.place("q"), fold.place("k")
GAP = fold.sub(Q, K)


def window(width: int) -> Index:
    return fold.conjunction(fold.less_equal(fold.const(0), GAP), fold.less(GAP, fold.const(width)))


def masked(tiled: Cover) -> int:
    return sum(p.elements for p in tiled.pieces if isinstance(p.mask, int))


@given(st.integers(2, 150), st.integers(1, 400), st.sampled_from([8, 16, 32]))
def test_parts_equal_the_relation(width: int, n: int, tile: int) -> None:
    relation = window(width)
    found = cover(relation, TileGrid(n, n, tile, tile), {})
    apart = split_full_parts(found)
    if apart is not None:
        check_pieces(apart.pieces, apart.masks, exact_evaluation.mask(relation, (0, n), (0, n)))
        assert masked(apart) < masked(found)
        assert (apart.visible, apart.full_tiles, apart.partial_tiles) == (
            found.visible,
            found.full_tiles,
            found.partial_tiles,
        )


def test_a_wide_window_has_a_full_middle() -> None:
    tiled = cover(window(512), TileGrid(4096, 4096, 64, 64), {})
    apart = split_full_parts(tiled)
    assert apart is not None
    assert {p.mask for p in apart.pieces if p.fresh} <= {"full", "causal"}
    assert any(p.mask == "causal" and not p.fresh for p in apart.pieces)
    assert masked(apart) < masked(tiled) / 4


@pytest.mark.parametrize("width", [2, 40])
def test_pieces_without_a_full_middle_are_not_split(width: int) -> None:
    assert split_full_parts(cover(window(width), TileGrid(1024, 1024, 64, 64), {})) is None


def test_masks_of_bricks_are_not_split() -> None:
    bricks = GridMask((np.eye(2, dtype=np.bool_), np.ones((2, 2), dtype=np.bool_)))
    piece = PlanPiece(stretch(0, 4), stretch(0, 4), 0)
    assert split_full_parts(Cover((piece,), (bricks,), 0, 1, 8)) is None


# --- triangles --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([32, 64, 128]))
def test_halves_equal_the_relation(width: int, n: int, tile: int) -> None:
    found = cover(window(width), TileGrid(n, n, tile, tile), {})
    halves = split_triangles(found)
    if halves is not None:
        check_pieces(halves.pieces, halves.masks, exact_evaluation.mask(window(width), (0, n), (0, n)))
        assert sum(map(computed, halves.pieces)) < sum(map(computed, found.pieces))


@pytest.mark.parametrize(("n", "splits"), [(127, False), (128, True), (300, True), (512, True), (513, False)])
def test_short_triangles_are_halved(n: int, splits: bool) -> None:
    tiled = cover(window(n), TileGrid(n, n, 1024, 1024), {})
    assert [p.mask for p in tiled.pieces] == ["causal"]
    halves = split_triangles(tiled)
    assert (halves is not None) == splits
    if halves is not None:
        assert [p.mask for p in halves.pieces] == ["causal", 0]


@pytest.mark.parametrize(
    ("rows", "keys"), [(1, 1), (64, 64), (512, 512), (513, 513), (1500, 1500), (700, 1200), (600, 40)]
)
def test_pairs_that_the_kernel_computes_under_a_diagonal(rows: int, keys: int) -> None:
    """The kernel computes, row by row, the blocks of 512 keys that begin at or before the row."""
    wanted = sum(min(keys, (row // KEY_BLOCK + 1) * KEY_BLOCK) for row in range(rows))
    piece = PlanPiece(stretch(0, rows), stretch(0, keys), 0)
    assert computed(piece, trimmed=True) == wanted
    assert computed(piece) == rows * keys
    if rows == keys:
        assert computed(PlanPiece(stretch(0, rows), stretch(0, keys), "causal")) == wanted
