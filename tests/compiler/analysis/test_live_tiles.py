"""The quadtree lists exactly the tiles with a visible pair, each once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

import expression_trees as trees
from attnc.compiler.analysis.live_tiles import TileGrid, TooManyTilesError, find_live_tiles
from attnc.compiler.ir import fold
from attnc.compiler.planning.runs import resolve
from expression_trees import Tree
from relations import relations
from tiers import examples
from tile_grids import grids, mask_of, tile_classes


def listed(row: NDArray[np.int64], column: NDArray[np.int64], count: NDArray[np.int64]) -> list[tuple[int, int]]:
    return [(r, c + i) for r, c, n in zip(row.tolist(), column.tolist(), count.tolist(), strict=True) for i in range(n)]


@settings(max_examples=examples(150))
@given(relations(), grids())
def test_tiles(tree: Tree, grid: TileGrid) -> None:
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


def test_a_grid_without_tokens() -> None:
    for grid in (TileGrid(0, 5, 8, 8), TileGrid(5, 0, 8, 8), TileGrid(0, 0, 8, 8)):
        tiles = find_live_tiles(fold.truth(True), grid)
        assert (tiles.full, tiles.partial) == (0, 0)


def test_too_many_tiles() -> None:
    q, k = fold.place("q"), fold.place("k")
    odd = fold.equal(fold.mod(fold.add(q, k), fold.const(3)), fold.const(0))
    with pytest.raises(TooManyTilesError):
        find_live_tiles(odd, TileGrid(4096, 4096, 8, 8), budget=1000)


@pytest.mark.parametrize("n", [1 << 16, (1 << 16) + 37])
def test_only_the_band_is_touched(n: int) -> None:
    q, k = fold.place("q"), fold.place("k")
    gap = fold.sub(q, k)
    window = fold.conjunction(fold.less_equal(fold.const(0), gap), fold.less(gap, fold.const(4096)))
    tiles = find_live_tiles(window, TileGrid(n, n, 128, 128))
    assert len(set(tiles.kind.tolist())) <= 6
    rows = -(-n // 128)
    assert tiles.partial <= 2 * rows
    assert tiles.full + tiles.partial <= 33 * rows
