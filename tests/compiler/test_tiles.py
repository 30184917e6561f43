"""The quadtree: live tiles are exactly those that hold something, once each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import expression_trees as trees
from attnc.compiler import fold
from attnc.compiler.analysis import exact
from attnc.compiler.analysis.tiles import Grid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index
from attnc.compiler.planning.runs import resolve
from attnc.spec.errors import EvaluationError
from expression_trees import Tree
from relations import relations


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    sizes = st.one_of(st.integers(1, 300), st.sampled_from([1, 31, 64, 65, 127, 128, 129, 256]))
    k_tile = draw(st.sampled_from([8, 13, 16, 32, 64]))
    q_tile = k_tile if draw(st.booleans()) else draw(st.sampled_from([8, 16, 24, 64]))
    origin = -draw(st.integers(0, k_tile - 1)) if draw(st.booleans()) else 0
    return Grid(draw(sizes), draw(sizes), q_tile, k_tile, origin)


def mask_of(relation: Index, grid: Grid) -> NDArray[np.bool_]:
    try:
        return exact.mask(relation, (0, grid.n_q), (0, grid.n_k))
    except EvaluationError:
        assume(False)
        raise


def tile_classes(mask: NDArray[np.bool_], grid: Grid) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Full and partial tiles by brute force."""
    full, partial = set(), set()
    for row in range(grid.rows):
        for column in range(grid.columns):
            part = mask[slice(*grid.row_range(row)), slice(*grid.key_range(column))]
            if part.all():
                full.add((row, column))
            elif part.any():
                partial.add((row, column))
    return full, partial


def listed(row: NDArray[np.int64], column: NDArray[np.int64], count: NDArray[np.int64]) -> list[tuple[int, int]]:
    return [(r, c + i) for r, c, n in zip(row.tolist(), column.tolist(), count.tolist(), strict=True) for i in range(n)]


@settings(max_examples=150)
@given(relations(), grids())
def test_tiles(tree: Tree, grid: Grid) -> None:
    relation = trees.build(tree)
    mask = mask_of(relation, grid)
    full, partial = tile_classes(mask, grid)
    tiles = find_live_tiles(relation, grid)
    called_full = listed(*(x[tiles.kind == 0] for x in (tiles.row, tiles.column, tiles.count)))
    undecided = listed(*(x[tiles.kind != 0] for x in (tiles.row, tiles.column, tiles.count)))
    assert len(called_full) == len(set(called_full)) == tiles.full
    assert len(undecided) == len(set(undecided)) == tiles.partial
    assert set(called_full) <= full
    assert partial <= set(undecided)
    assert full <= set(called_full) | set(undecided)
    assert not set(called_full) & set(undecided)
    resolved = resolve(relation, tiles, {})
    assert (resolved.tiles.full, resolved.tiles.partial) == (len(full), len(partial))
    assert resolved.visible == mask.sum()


def test_nothing_to_cover() -> None:
    for grid in (Grid(0, 5, 8, 8), Grid(5, 0, 8, 8), Grid(0, 0, 8, 8)):
        tiles = find_live_tiles(fold.truth(True), grid)
        assert (tiles.full, tiles.partial) == (0, 0)


def test_too_many_tiles() -> None:
    q, k = fold.place("q"), fold.place("k")
    odd = fold.equal(fold.mod(fold.add(q, k), fold.const(3)), fold.const(0))
    with pytest.raises(TooManyTilesError):
        find_live_tiles(odd, Grid(4096, 4096, 8, 8), budget=1000)


@pytest.mark.parametrize("n", [1 << 16, (1 << 16) + 37])
def test_only_the_band_is_touched(n: int) -> None:
    q, k = fold.place("q"), fold.place("k")
    gap = fold.sub(q, k)
    window = fold.conjunction(fold.less_equal(fold.const(0), gap), fold.less(gap, fold.const(4096)))
    tiles = find_live_tiles(window, Grid(n, n, 128, 128))
    assert len(set(tiles.kind.tolist())) <= 6
    rows = -(-n // 128)
    assert tiles.partial <= 2 * rows
    assert tiles.full + tiles.partial <= 33 * rows
