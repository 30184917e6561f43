"""Runs of tiles: by rows and by columns they equal the relation; classes are few and in a fixed order."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.ir import Index, fold
from attnc.compiler.planning.runs import ResolvedRuns, resolve
from attnc.compiler.tile_forms.tile_lists import TileRuns, find_tile_runs, list_tiles, mask_edges
from tiers import examples
from tile_painting import Matrix, alike, as_matrix, brute, grid_frame, painted, patterns

Q, K = fold.place("q"), fold.place("k")


def check(runs: TileRuns, mask: Matrix) -> None:
    tiles = brute(mask, runs.frame)
    assert (as_matrix(runs.full) == (tiles == -1)).all()
    assert (as_matrix(runs.partial) == (tiles > 0)).all()
    assert (as_matrix(runs.full.union(runs.partial)) == (tiles != 0)).all()
    assert (runs.visible_by_class[runs.classes] == tiles[tiles > 0]).all()
    assert runs.visible == mask.sum()
    assert (painted(list_tiles(runs)) == mask).all()


@settings(max_examples=examples(200))
@given(patterns())
def test_runs_equal_the_relation(drawn: tuple[ResolvedRuns, Matrix]) -> None:
    resolved, mask = drawn
    runs = find_tile_runs(resolved)
    rows, columns = grid_frame(resolved.tiles.grid)
    assert runs.frame.heights.tolist() == rows
    assert runs.frame.widths.tolist() == columns
    check(runs, mask)
    assert len({(m.shape, m.tobytes()) for m in runs.masks}) == len(runs.masks)
    assert list(dict.fromkeys(runs.classes.tolist())) == list(range(len(runs.masks)))
    assert runs.partial.tiles == len(runs.classes)


@settings(max_examples=examples(150))
@given(patterns())
def test_transposed_runs_are_the_transposed_relation(drawn: tuple[ResolvedRuns, Matrix]) -> None:
    resolved, mask = drawn
    runs = find_tile_runs(resolved)
    check(runs.transposed(), mask.T)
    assert alike(runs.transposed().transposed(), runs)


@settings(max_examples=examples(60))
@given(patterns())
def test_the_names_of_classes_do_not_matter(drawn: tuple[ResolvedRuns, Matrix]) -> None:
    resolved, _ = drawn
    tiles = resolved.tiles
    names = {kind: i for i, kind in enumerate(sorted(resolved.masks, reverse=True), start=1)}
    kind = np.array([names.get(int(k), 0) for k in tiles.kind], dtype=np.uint64)
    renamed = ResolvedRuns(
        replace(tiles, kind=kind), {names[k]: mask for k, mask in resolved.masks.items()}, resolved.visible
    )
    assert alike(find_tile_runs(renamed), find_tile_runs(resolved))


@settings(max_examples=examples(100))
@given(patterns())
def test_masked_edges_leave_only_whole_tiles_full(drawn: tuple[ResolvedRuns, Matrix]) -> None:
    resolved, mask = drawn
    runs = find_tile_runs(resolved)
    masked = mask_edges(runs)
    frame = runs.frame
    whole = np.outer(frame.heights == frame.tile[0], frame.widths == frame.tile[1])
    assert (as_matrix(masked.full) == (as_matrix(runs.full) & whole)).all()
    assert (as_matrix(masked.full.union(masked.partial)) == as_matrix(runs.full.union(runs.partial))).all()
    assert (painted(list_tiles(masked)) == mask).all()
    assert masked.visible == mask.sum()


def window(width: int) -> Index:
    gap = fold.sub(Q, K)
    return fold.conjunction(fold.less_equal(fold.const(0), gap), fold.less(gap, fold.const(width)))


@pytest.mark.parametrize(
    ("relation", "tiles"), [(window(4096), 253_456), (fold.less_equal(K, Q), 33_550_336)], ids=["window", "causal"]
)
def test_a_million_tokens_take_little_memory(relation: Index, tiles: int) -> None:
    """Runs and transposed runs never list the 33 million full tiles of a causal relation."""
    grid = TileGrid(1 << 20, 1 << 20, 128, 128)
    tracemalloc.start()
    runs = find_tile_runs(resolve(relation, find_live_tiles(relation, grid), {}))
    assert runs.full.tiles == runs.transposed().full.tiles == tiles
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_runs_are_printed() -> None:
    relation = window(8)
    runs = find_tile_runs(resolve(relation, find_live_tiles(relation, TileGrid(16, 16, 4, 4)), {}))
    assert str(runs) == (
        "3 full and 6 partial tiles, 2 masks\n"
        "0: partial 0..1\n"
        "1: full 0..1; partial 1..2\n"
        "2: full 1..2; partial 0..1, 2..3\n"
        "3: full 2..3; partial 1..2, 3..4"
    )
