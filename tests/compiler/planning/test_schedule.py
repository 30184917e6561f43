"""The choice among covers: tile sizes, fallbacks and their reasons."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import expression_trees as trees
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Data, Index, fold
from attnc.compiler.planning.rates import AMX
from attnc.compiler.planning.schedule import CoverProblem, choose, tile_sizes
from attnc.spec.errors import EvaluationError
from expression_trees import Tree
from plan_checks import check_pieces
from relations import relations
from tiers import examples

Q, K = fold.place("q"), fold.place("k")
GAP = fold.sub(Q, K)


def problem(relation: Index, n_q: int, n_k: int, dtype: str = "float32") -> CoverProblem:
    return CoverProblem(relation, n_q, n_k, dtype, 64, 4, {}, AMX)


@settings(max_examples=examples(80))
@given(relations(), st.integers(1, 700), st.integers(1, 700), st.sampled_from(["float32", "bfloat16"]))
def test_choices(tree: Tree, n_q: int, n_k: int, dtype: str) -> None:
    relation = trees.build(tree)
    try:
        mask = exact_evaluation.mask(relation, (0, n_q), (0, n_k))
    except EvaluationError:
        assume(False)
        raise
    chosen = choose(problem(relation, n_q, n_k, dtype))
    check_pieces(chosen.cover.pieces, chosen.cover.masks, mask)
    assert chosen.cover.visible in (None, mask.sum())
    assert chosen.reasons
    assert chosen.cost >= 0


def test_tiles_fit_the_blocks_of_the_relation() -> None:
    blocked = fold.equal(fold.floordiv(Q, fold.const(48)), fold.floordiv(K, fold.const(48)))
    assert 96 in tile_sizes(problem(blocked, 4096, 4096))
    assert tile_sizes(problem(fold.less_equal(K, Q), 4096, 4096)) == (128, 64, 256)
    assert tile_sizes(problem(fold.less_equal(K, Q), 4096, 4096, "bfloat16")) == (256, 128, 64)
    assert 77 in tile_sizes(problem(blocked, 50, 77))


def test_noise_runs_dense_with_a_reason() -> None:
    n = 4096
    noise = Data("noise", np.random.default_rng(0).integers(0, 1 << 30, n))
    value = fold.add(fold.data_read(noise, (Q,)), fold.times(fold.data_read(noise, (K,)), 3))
    chosen = choose(problem(fold.equal(fold.mod(value, fold.const(7)), fold.const(0)), n, n))
    assert chosen.schedule == "dense by row blocks"
    assert chosen.fallback is not None
    assert "share masks" in chosen.fallback
    assert all(piece.mask == "exact" for piece in chosen.cover.pieces)


@pytest.mark.parametrize("n", [1, 31, 128, 1000, 4096])
def test_a_window_runs_by_tiles_without_a_fallback(n: int) -> None:
    window = fold.conjunction(fold.less_equal(fold.const(0), GAP), fold.less(GAP, fold.const(300)))
    chosen = choose(problem(window, n, n))
    assert chosen.schedule == "pieces"
    assert chosen.fallback is None
    check_pieces(chosen.cover.pieces, chosen.cover.masks, exact_evaluation.mask(window, (0, n), (0, n)))


def test_a_long_relation_is_covered_by_one_size_of_tiles() -> None:
    """For 1,000 remainders each tile size took half a second, and four sizes were compared."""
    conditions = [fold.negation(fold.equal(fold.mod(GAP, fold.const(c)), fold.const(1))) for c in range(2, 902)]
    cover_problem = problem(fold.conjunction(*conditions), 256, 256)
    chosen = choose(cover_problem)
    reason = f"the relation has {cover_problem.work.nodes:,} nodes"
    assert any("are not tried" in one and reason in one for one in chosen.reasons)
    check_pieces(
        chosen.cover.pieces, chosen.cover.masks, exact_evaluation.mask(cover_problem.relation, (0, 256), (0, 256))
    )
