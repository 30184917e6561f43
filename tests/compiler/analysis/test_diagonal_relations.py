"""Relations that repeat along diagonals: one row per group is analysed, and the pieces still equal the relation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.live_tiles import TileGrid, find_live_tiles
from attnc.compiler.analysis.repetition import find_repeated_tiles
from attnc.compiler.analysis.translation import Dependence, Dependences, Translation
from attnc.compiler.ir import Index, fold
from attnc.compiler.planning.pieces import cover
from plan_checks import check_pieces
from tiers import examples

Q, K = fold.place("q"), fold.place("k")
GAP = fold.sub(Q, K)


def between(value: Index, low: int, high: int) -> Index:
    return fold.conjunction(fold.less_equal(fold.const(low), value), fold.less(value, fold.const(high)))


def block(place: Index, size: int) -> Index:
    return fold.floordiv(place, fold.const(size))


def far(gap: Index, *distances: int) -> Index:
    return fold.disjunction(*(fold.equal(fold.absolute(gap), fold.const(d)) for d in distances))


RELATIONS = {
    "window": between(GAP, 0, 40),
    "two sides": between(GAP, -11, 23),
    "distances": fold.disjunction(between(GAP, 0, 3), far(GAP, 64, 200, 201)),
    "blocks": far(fold.sub(block(Q, 8), block(K, 8)), 0, 4, 9),
    "ahead": between(GAP, -300, -280),
    "sinks": fold.conjunction(
        fold.less_equal(K, Q), fold.disjunction(fold.less(GAP, fold.const(40)), fold.less(K, fold.const(5)))
    ),
    "first block": fold.disjunction(far(fold.sub(block(Q, 8), block(K, 8)), 0, 4, 9), fold.zero(block(K, 8))),
    "tokens for all": fold.disjunction(
        between(GAP, -20, 21), *(fold.less(x, fold.const(3)) for x in (Q, K)), fold.equal(K, fold.const(300))
    ),
    "hidden tokens": fold.conjunction(
        between(GAP, -20, 21), *(fold.negation(fold.equal(x, fold.const(77))) for x in (Q, K))
    ),
}


@settings(max_examples=examples(40))
@given(
    st.sampled_from(sorted(RELATIONS)),
    st.integers(500, 900),
    st.integers(500, 900),
    st.sampled_from([0, 3, 7]),
    st.booleans(),
)
def test_repeating_rows(name: str, n_q: int, n_k: int, origin: int, whole: bool) -> None:
    n_q, n_k = (n_q // 8 * 8, n_k // 8 * 8) if whole else (n_q, n_k)
    relation, grid = RELATIONS[name], TileGrid(n_q, n_k, 8, 8, 0 if "block" in name else -origin)
    found = find_repeated_tiles(relation, grid)
    mask = exact_evaluation.mask(relation, (0, n_q), (0, n_k))
    if found is not None:
        every = find_live_tiles(relation, grid)
        assert (found.full, found.partial) == (every.full, every.partial)
    pieces = cover(relation, grid, {})
    check_pieces(pieces.pieces, pieces.masks, mask)
    assert pieces.visible == mask.sum()


@pytest.mark.parametrize("name", sorted(RELATIONS))
def test_few_rows_are_analysed(name: str) -> None:
    tiles = find_repeated_tiles(RELATIONS[name], TileGrid(8192, 8192, 8, 8))
    assert tiles is not None
    assert len(np.unique(tiles.row)) <= 64
    assert len(cover(RELATIONS[name], TileGrid(8192, 8192, 8, 8), {}).pieces) <= 48


def test_dependences_of_conditions() -> None:
    of = Dependences().of
    assert of(fold.less(Q, fold.const(3)), 8) == Dependence("rows")
    assert of(fold.less(fold.const(3), block(K, 5)), 8) == Dependence("columns")
    assert of(fold.less(GAP, fold.const(3)), 8) == Dependence("diagonals", 1)
    apart = fold.less(fold.sub(block(Q, 16), block(K, 16)), fold.const(3))
    assert of(apart, 8) == Dependence("diagonals", 2)
    assert of(apart, 16) == Dependence("diagonals", 1)
    assert of(apart, None) == Dependence("both")
    assert of(fold.less(fold.add(Q, K), fold.const(3)), 8) == Dependence("both")


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 60), st.integers(0, 60))
def test_translations_of_nodes(a: int, b: int, q: int, k: int) -> None:
    """A node's translation states by how much its value grows; the value grows by that number."""
    nodes = [
        fold.sub(block(Q, a), block(K, b)),
        fold.mod(fold.add(Q, fold.times(K, 2)), fold.const(a)),
        fold.minimum(block(Q, a), block(K, a)),
        block(fold.add(fold.times(Q, b), K), a),
        fold.absolute(fold.sub(fold.mod(Q, fold.const(a)), fold.mod(K, fold.const(b)))),
    ]
    for node in nodes:
        growth = Dependences().growth(node)
        if growth is not None:
            here, there = (
                int(exact_evaluation.integers(node, (q + s, q + s + 1), (k + s, k + s + 1))[0, 0])
                for s in (0, growth.tokens)
            )
            assert there - here == growth.by, node
    assert Dependences().growth(Q) == Translation(1, 1)
