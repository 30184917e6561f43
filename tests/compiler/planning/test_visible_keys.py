"""The keys visible to a few rows, against the relation at every pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import expression_trees as trees
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.ir import Index, fold
from attnc.compiler.planning.row_keys import find_row_keys
from attnc.compiler.planning.seen_keys import LEAF, MOST_SLICES, Int64, Mask, SeenKeys, find_seen_keys, seen_by_rows
from expression_trees import Tree
from relations import relations
from tiers import examples
from tile_grids import mask_of

Q, K = fold.place("q"), fold.place("k")


def check(relation: Index, rows: tuple[int, int], n_k: int) -> SeenKeys:
    wanted = mask_of(relation, TileGrid(rows[1], n_k, 64, 64))[rows[0] :]
    visible = find_seen_keys(relation, rows, n_k)
    keys, mask = visible.every
    assert (np.diff(keys) > 0).all()
    assert keys.tolist() == np.flatnonzero(wanted.any(axis=0)).tolist()
    assert (mask == wanted[:, keys]).all()
    assert visible.count == len(keys)
    whole = np.zeros(n_k, dtype=np.bool_)
    for first, stop in zip(visible.first, visible.stop, strict=True):
        assert first < stop
        whole[first:stop] = True
    assert (whole == wanted.all(axis=0)).all()
    assert (visible.first[1:] > visible.stop[:-1]).all()
    if visible.slices is not None:
        assert len(visible.slices) <= MOST_SLICES
        assert [k for key_slice in visible.slices for k in range(n_k)[key_slice]] == np.flatnonzero(whole).tolist()
    return visible


@settings(max_examples=examples(200))
@given(relations(), st.integers(1, 700), st.integers(1, 16), st.integers(0, 100))
def test_visible_keys_equal_the_relation(tree: Tree, n_k: int, rows: int, first: int) -> None:
    check(trees.build(tree), (first, first + rows), n_k)


@pytest.mark.parametrize("n_k", [1, 31, 32, 33, 512, 513, 5000])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_window_at_the_end(n_k: int, rows: int) -> None:
    rows = min(rows, n_k)
    gap = fold.sub(Q, K)
    window = fold.conjunction(fold.less_equal(fold.const(0), gap), fold.less(gap, fold.const(40)))
    visible = check(window, (n_k - rows, n_k), n_k)
    assert len(visible.first) <= 1
    assert len(visible.keys) <= 2 * (rows - 1)


@pytest.mark.parametrize(
    ("stretches", "slices"),
    [
        ([(3, 9)], [slice(3, 9, 1)]),
        ([(2, 3), (6, 7), (10, 11), (14, 15)], [slice(2, 15, 4)]),
        ([(0, 1), (8, 9), (16, 17), (20, 30)], [slice(0, 17, 8), slice(20, 30, 1)]),
        ([(0, 4), (8, 12), (16, 20)], [slice(0, 4, 1), slice(8, 12, 1), slice(16, 20, 1)]),
        ([(0, 1), (3, 4), (7, 8), (9, 10), (11, 12)], [slice(0, 4, 3), slice(7, 12, 2)]),
        ([(1, 2)], [slice(1, 2, 1)]),
        ([], []),
        ([(0, 2), (4, 6), (8, 10), (12, 14), (16, 18)], None),
    ],
)
def test_slices(stretches: list[tuple[int, int]], slices: list[slice] | None) -> None:
    """Single keys at even steps are one slice; keys that need more than a few slices have none."""
    first, stop = (np.array([ends[i] for ends in stretches], dtype=np.int64) for i in (0, 1))
    keys = SeenKeys(first, stop, np.zeros(0, dtype=np.int64), np.ones((1, 0), dtype=np.bool_))
    assert keys.slices == (None if slices is None else tuple(slices))


def test_no_keys_are_visible_among_none() -> None:
    assert find_seen_keys(fold.less_equal(K, Q), (0, 3), 0).count == 0


def test_distant_keys_are_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs that are evaluated one by one stay few, however many keys there are."""
    looked: list[int] = []
    mask_at = exact_evaluation.mask_at

    def counted(relation: Index, q: Int64, k: Int64, active: Mask, *rest: Any, wide: bool) -> Mask:
        looked.append(len(k))
        return mask_at(relation, q, k, active, *rest, wide=wide)

    monkeypatch.setattr(exact_evaluation, "mask_at", counted)
    gap = fold.sub(Q, K)
    window = fold.conjunction(fold.less_equal(fold.const(0), gap), fold.less(gap, fold.const(4096)))
    n = 1 << 22
    assert find_seen_keys(window, (n - 3, n), n).count == 4098
    assert 0 < sum(looked) <= 4 * LEAF


@pytest.mark.parametrize("n_k", [1, 2, 17, 64, 333])
@pytest.mark.parametrize("rows", [1, 2, 4, 16])
@pytest.mark.parametrize("sinks", [0, 3])
def test_formulas_give_the_keys_of_the_search(n_k: int, rows: int, sinks: int) -> None:
    rows = min(rows, n_k)
    gap = fold.sub(Q, K)
    window = fold.conjunction(fold.less_equal(fold.const(0), gap), fold.less(gap, fold.const(20)))
    first = fold.conjunction(fold.less(K, fold.const(sinks)), fold.less_equal(K, Q))
    relation = fold.disjunction(window, first)
    formulas = find_row_keys(relation, heads=4, group=2)
    assert formulas is not None
    searched, given_ = check(relation, (n_k - rows, n_k), n_k), seen_by_rows(formulas, (n_k - rows, n_k), n_k)
    for name in ("first", "stop", "keys", "mask"):
        np.testing.assert_array_equal(getattr(given_, name), getattr(searched, name))
        assert getattr(given_, name).dtype == getattr(searched, name).dtype
