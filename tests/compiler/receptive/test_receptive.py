"""Receptive fields against powers of dense matrices, and the growth that papers claim."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.arrays import spread
from attnc.compiler.ir import Index, fold
from attnc.compiler.receptive import fields, piece_ranges, sights
from attnc.compiler.receptive.fields import find_path, find_reach
from attnc.compiler.receptive.laws import find_law
from attnc.compiler.receptive.piece_ranges import MarkedKeys, merged_runs
from attnc.compiler.receptive.sights import Sight, alternatives
from attnc.spec.errors import EvaluationError
from expression_trees import build
from grid_relations import grids
from receptive_fields import check_reach, fewest_changes, layer_of
from relations import relations

Mask = NDArray[np.bool_]
Q, K = fold.place("q"), fold.place("k")
GAP = fold.sub(Q, K)

lengths = st.sampled_from([1, 2, 7, 33, 64, 130])


def dense(relation: Index, n: int) -> Mask:
    return exact_evaluation.mask(relation, (0, n), (0, n))


def window(width: int) -> Index:
    return fold.conjunction(fold.less_equal(K, Q), fold.less(GAP, fold.const(width)))


def power(near: int, block: int) -> Index:
    size = fold.const(block)
    gap = fold.sub(fold.floordiv(Q, size), fold.floordiv(K, size))
    highest_bit = fold.power(fold.const(2), fold.add(fold.function("bitlen", gap), fold.const(-1)))
    is_power = fold.conjunction(fold.less(fold.const(0), gap), fold.equal(gap, highest_bit))
    kept = fold.disjunction(fold.less(gap, fold.const(near)), is_power)
    return fold.conjunction(fold.less_equal(K, Q), kept)


# --- keys that a set of queries sees ----------------------------------------------------------------------------------


@given(relations(2), st.integers(1, 150), st.integers(1, 150), st.data())
def test_the_keys_that_queries_see(tree: Any, n_q: int, n_k: int, data: st.DataObject) -> None:
    relation = build(tree)
    chosen = data.draw(st.sets(st.integers(0, n_q - 1), min_size=1))
    before = data.draw(st.sets(st.integers(0, n_k - 1)))
    check_sight(relation, n_q, n_k, np.array(sorted(chosen)), np.array(sorted(before), dtype=np.int64))


def check_sight(relation: Index, n_q: int, n_k: int, queries: NDArray[np.int64], before: NDArray[np.int64]) -> None:
    try:
        mask = exact_evaluation.mask(relation, (0, n_q), (0, n_k))
    except EvaluationError:
        return
    sight, seen = Sight(relation, n_q, n_k, {}), np.zeros(n_k, dtype=np.bool_)
    seen[before] = True
    wanted = mask[queries].any(axis=0)
    assert sight.look(queries, seen).tolist() == np.setdiff1d(np.flatnonzero(wanted), before).tolist()
    assert np.flatnonzero(seen).tolist() == np.union1d(np.flatnonzero(wanted), before).tolist()
    assert (sight.shows(queries, before) == mask[np.ix_(queries, before)]).all()


@given(relations(2), lengths, st.data())
def test_with_small_limits(tree: Any, n: int, data: st.DataObject) -> None:
    """Every method is exercised: convolutions, few runs and rows at once, and relations without alternatives."""
    chosen = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    with pytest.MonkeyPatch.context() as patch:
        most = data.draw(st.sampled_from([1, 64]))
        patch.setattr(sights, "MOST", most)
        patch.setattr(sights, "MOST_RUNS", 0)
        patch.setattr(piece_ranges, "FEW", 0)
        for module in (sights, piece_ranges):
            patch.setattr(module, "AT_ONCE", 1)
        check_sight(build(tree), n, n, np.array(sorted(chosen)), np.zeros(0, dtype=np.int64))


@given(relations(2), st.integers(1, 40))
def test_alternatives_are_the_relation(tree: Any, n: int) -> None:
    relation = build(tree)
    try:
        found = np.zeros((n, n), dtype=np.bool_)
        for conjuncts in alternatives(relation):
            found |= dense(fold.conjunction(*conjuncts), n)
    except EvaluationError:
        return
    assert (found == dense(relation, n)).all()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30))))
def test_merged_runs(found: list[tuple[int, int]]) -> None:
    first, stop = (np.array([pair[i] for pair in found], dtype=np.int64) for i in (0, 1))
    one, other = merged_runs(first, stop)
    tokens = {t for a, b in found for t in range(a, b)}
    assert spread(one, other).tolist() == sorted(tokens)
    assert (one[1:] > other[:-1]).all()


def test_a_key_is_new_once() -> None:
    keys = MarkedKeys(np.array([True, False, False, False, False]))
    keys.add(np.array([3, 0, 3]))
    keys.add_runs(np.array([-4, 2]), np.array([2, 9]), np.array([True, True, True, True, False]))
    assert keys.fresh().tolist() == [1, 2, 3]


def test_a_guarded_part_is_evaluated_under_its_guard() -> None:
    divides = fold.equal(fold.mod(Q, K), fold.const(0))
    relation = fold.conjunction(fold.less(fold.const(0), K), divides)
    check_sight(relation, 40, 40, np.array([36]), np.zeros(0, dtype=np.int64))


# --- reach -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(relations(), min_size=1, max_size=2), min_size=1, max_size=3), lengths, st.data())
def test_reach(trees: list[list[Any]], n: int, data: st.DataObject) -> None:
    """The stack has layers of one head or two, in any order."""
    heads = [[build(tree) for tree in layer] for layer in trees]
    order = data.draw(st.lists(st.integers(0, len(heads) - 1), min_size=1, max_size=5))
    try:
        masks = [np.logical_or.reduce([dense(head, n) for head in layer]) for layer in heads]
        kinds = [layer_of(n, *layer) for layer in heads]
        used = sorted(set(order))
        order = [used.index(i) for i in order]
        check_reach([kinds[i] for i in used], [masks[i] for i in used], order, data.draw(st.integers(0, n - 1)))
    except EvaluationError:
        return


@given(st.data())
def test_reach_on_grids(data: st.DataObject) -> None:
    extents, relation = data.draw(grids())
    n = int(np.prod(extents))
    check_reach([layer_of(n, relation)], [dense(relation, n)], [0], data.draw(st.integers(0, n - 1)))


@given(st.lists(relations(), min_size=1, max_size=2), st.sampled_from([1, 7, 20]), st.data())
def test_a_path_changes_distance_least_often(trees: list[Any], n: int, data: st.DataObject) -> None:
    order = data.draw(st.lists(st.integers(0, len(trees) - 1), min_size=1, max_size=3))
    query = data.draw(st.integers(0, n - 1))
    try:
        masks = [dense(build(tree), n) for tree in trees]
    except EvaluationError:
        return
    kinds = [layer_of(n, build(tree)) for tree in trees]
    for token, layer in enumerate(find_reach(kinds, order, query, 1, range(n)).known):
        if layer is not None:
            way = find_path(kinds, order, query, token, layer)
            changes = sum(a != b for a, b in pairwise(way))
            assert (way[0], way[-1], len(way)) == (token, query, layer + 1)
            assert changes >= fewest_changes(masks, order, query, token, layer)
            if len(set(order)) == 1:
                assert changes == layer


@pytest.mark.parametrize("width", [2, 5, 64])
def test_a_window_grows_by_its_width(width: int) -> None:
    """After l layers a query reaches exactly l · (width - 1) + 1 tokens."""
    n = 10 * width
    reach = find_reach([layer_of(n, window(width))], [0], n - 1, 1)
    layers = -(-(n - 1) // (width - 1))
    assert [item.tokens for item in reach.after] == [min(n, i * (width - 1) + 1) for i in range(layers + 1)]
    assert (reach.complete, reach.final, reach.looks_back) == (layers, layers, True)


@pytest.mark.parametrize("block", [1, 16])
def test_powers_of_two_double(block: int) -> None:
    """A distance with d ones in binary is d jumps of PowerAttention: d layers reach the last 2^(d + 1) - 1 blocks."""
    n = 1024 * block
    reach = find_reach([layer_of(n, power(1, block))], [0], n - 1, 1)
    assert [item.within + 1 for item in reach.after[1:10]] == [(2 ** (d + 1) - 1) * block for d in range(1, 10)]
    assert reach.complete == 10
    law = find_law([item.within for item in reach.after[1:10]])
    assert law is not None
    assert (law.kind, law.step, law.count) == ("exponential", 2, 9)


def test_a_million_tokens_are_followed_to_the_end() -> None:
    n = 1 << 20
    reach = find_reach([layer_of(n, window(4096))], [0], n - 1, 1)
    assert reach.complete == -(-(n - 1) // 4095)
    layer = layer_of(n, power(5, 256))
    reach = find_reach([layer], [0], n - 1, 1, [0])
    assert (reach.complete, reach.known) == (11, (11,))
    assert len(find_path([layer], [0], n - 1, 0, 11)) == 12


def test_the_search_stops_at_its_documented_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "MOST_LAYERS", 6)
    reach = find_reach([layer_of(100, window(2))], [0], 99, 4)
    assert (len(reach.after), reach.complete, reach.final) == (7, None, None)
    reach = find_reach([layer_of(100, window(2))], [0], 99, 8)
    assert len(reach.after) == 9


def test_alternating_windows() -> None:
    """Layers 1, 2, 4, 5, … see 4 keys and the others 9; a query looks through the last layer first."""
    narrow, wide = window(4), window(9)
    reach = find_reach([layer_of(60, narrow), layer_of(60, wide)], [0, 0, 1], 59, 1)
    assert [item.tokens - 1 for item in reach.after[:7]] == [0, 3, 6, 14, 17, 20, 28]


# --- laws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "kind", "step", "count"),
    [
        ([511, 1022, 1533], "linear", 511, 3),
        ([7, 10, 13, 15], "linear", 3, 3),
        ([49, 100, 169, 256, 361], "polynomial", 18, 5),
        ([343, 1000, 2197, 4096, 6859, 10648, 15625], "polynomial", 162, 7),
        ([1279, 3327, 7423, 15615], "exponential", 2, 4),
        ([1, 4, 13, 40, 121], "exponential", 3, 5),
    ],
)
def test_laws(numbers: list[int], kind: str, step: int, count: int) -> None:
    law = find_law(numbers)
    assert law is not None
    assert (law.kind, law.step, law.count) == (kind, step, count)
    assert str(law).startswith({"polynomial": ("quadratic", "cubic")}.get(kind, kind))


@pytest.mark.parametrize("numbers", [[], [3], [3, 4], [5, 5, 5, 5], [4, 3, 2, 1], [1, 2, 4, 7, 13, 24], [3, 5, 9]])
def test_numbers_without_a_law(numbers: list[int]) -> None:
    assert find_law(numbers) is None
