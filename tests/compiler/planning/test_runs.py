"""Runs: adjacent live tiles, named so that equal names mean equal masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import expression_trees as trees
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.ir import fold
from attnc.compiler.planning import runs
from attnc.compiler.planning.runs import (
    Runs,
    TooManyClassesError,
    find_runs,
    is_diagonal,
    resolve,
    run_mask,
    split_runs,
    staircases,
)
from attnc.spec.errors import EvaluationError
from expression_trees import Tree
from relations import relations
from tiers import examples


@settings(max_examples=examples(80))
@given(relations(), st.integers(1, 200), st.integers(1, 200), st.sampled_from([8, 13, 32]), st.integers(0, 7))
def test_runs(tree: Tree, n_q: int, n_k: int, tile: int, shift: int) -> None:
    relation, grid = trees.build(tree), TileGrid(n_q, n_k, tile, tile, -shift)
    try:
        mask = exact_evaluation.mask(relation, (0, n_q), (0, n_k))
    except EvaluationError:
        assume(False)
        raise
    resolved = resolve(relation, find_live_tiles(relation, grid), {})
    found = find_runs(resolved.tiles)
    for group in (found, split_runs(found)):
        rebuilt = np.zeros_like(mask)
        for i in range(len(group)):
            box = _box(group, i, grid)
            assert not rebuilt[box].any()
            rebuilt[box] = run_mask(group, i, resolved)
            assert rebuilt[box].any()
        assert (rebuilt == mask).all()
    assert ((found.row[:-1] < found.row[1:]) | (found.end[:-1] < found.column[1:])).all()
    steps, rest = staircases(found, resolved)
    members = [i for group in steps for i in group.tolist()]
    assert sorted([*members, *np.flatnonzero(rest).tolist()]) == list(range(len(found)))
    assert len(set(found.row[members].tolist())) == len(members)


def _box(group: Runs, i: int, grid: TileGrid) -> tuple[slice, slice]:
    keys = grid.key_range(int(group.column[i]))[0], grid.key_range(int(group.end[i]) - 1)[1]
    return slice(*grid.row_range(int(group.row[i]))), slice(*keys)


def test_diagonals() -> None:
    assert is_diagonal(np.tri(5, dtype=np.bool_))
    assert is_diagonal(np.ones((1, 1), dtype=np.bool_))
    for wrong in (np.tri(5, 6, dtype=np.bool_), np.tri(5, 5, 1, dtype=np.bool_), np.eye(4, dtype=np.bool_)):
        assert not is_diagonal(wrong)


def test_classes_past_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = fold.place("q"), fold.place("k")
    relation = fold.less_equal(fold.mul(k, k), q)
    tiles = find_live_tiles(relation, TileGrid(200, 200, 8, 8))
    monkeypatch.setattr(runs, "MAX_CLASS_ELEMENTS", 64)
    with pytest.raises(TooManyClassesError):
        resolve(relation, tiles, {})
