"""Tile lists by rows and by columns, each against an independent enumeration."""

from __future__ import annotations

from hypothesis import given, settings

import expression_trees as trees
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.ir import fold
from attnc.compiler.ir.rewrite import substitute
from attnc.compiler.planning.runs import ResolvedRuns, resolve
from attnc.compiler.tile_forms.tile_lists import TileLists, find_tile_runs, list_tiles
from expression_trees import Tree
from relations import relations
from tiers import examples
from tile_grids import grids, mask_of
from tile_painting import Matrix, brute, painted, patterns

Q, K = fold.place("q"), fold.place("k")


def check(lists: TileLists, mask: Matrix) -> None:
    tiles = brute(mask, lists.frame)
    for row in range(lists.frame.rows):
        assert lists.full.of_row(row).tolist() == (tiles[row] == -1).nonzero()[0].tolist()
        assert lists.partial.of_row(row).tolist() == (tiles[row] > 0).nonzero()[0].tolist()
    assert (painted(lists) == mask).all()
    assert all(not m.all() and m.any() for m in lists.masks)


@settings(max_examples=examples(200))
@given(patterns())
def test_lists_equal_the_relation(drawn: tuple[ResolvedRuns, Matrix]) -> None:
    resolved, mask = drawn
    runs = find_tile_runs(resolved)
    lists = list_tiles(runs)
    check(lists, mask)
    assert (lists.classes == runs.classes).all()


@settings(max_examples=examples(200))
@given(relations(), grids())
def test_lists_of_transposed_runs_are_the_transposed_relation(tree: Tree, grid: TileGrid) -> None:
    """Queries and keys are exchanged in the relation itself, which is then evaluated."""
    relation = trees.build(tree)
    mask_of(relation, grid)
    turned = exact_evaluation.mask(substitute(relation, {Q: K, K: Q}), (0, grid.n_k), (0, grid.n_q))
    runs = find_tile_runs(resolve(relation, find_live_tiles(relation, grid), {}))
    check(list_tiles(runs.transposed()), turned)


def test_empty_matrices_have_no_tiles() -> None:
    for grid in (TileGrid(0, 5, 8, 8), TileGrid(5, 0, 8, 8), TileGrid(0, 0, 8, 8)):
        lists = list_tiles(find_tile_runs(resolve(fold.truth(True), find_live_tiles(fold.truth(True), grid), {})))
        assert (len(lists.full), len(lists.partial), lists.masks) == (0, 0, ())


def test_lists_are_printed() -> None:
    causal = fold.less_equal(K, Q)
    lists = list_tiles(find_tile_runs(resolve(causal, find_live_tiles(causal, TileGrid(12, 12, 4, 4)), {})))
    assert (
        str(lists)
        == "3 full and 3 partial tiles, 1 masks\n0: partial 0:0\n1: full 0; partial 1:0\n2: full 0 1; partial 2:0"
    )
