"""Residue classes: the parts cover each pair of the relation once, and each class is the relation on its tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Index, fold
from attnc.compiler.planning.formulas import diagonal_shift
from attnc.compiler.planning.rates import AMX
from attnc.compiler.planning.residues import Congruence, residues, split
from attnc.compiler.planning.schedule import CoverProblem, choose
from plan_checks import check_pieces

Q, K = fold.place("q"), fold.place("k")
GAP = fold.sub(Q, K)
CAUSAL = fold.less_equal(K, Q)


def near(window: int) -> Index:
    return fold.conjunction(CAUSAL, fold.less(GAP, fold.const(window)))


def every(divisor: int, offset: int = 0) -> Index:
    return fold.equal(fold.mod(GAP, fold.const(divisor)), fold.const(offset))


def strided(window: int, divisor: int) -> Index:
    return fold.disjunction(near(window), fold.conjunction(CAUSAL, every(divisor)))


@pytest.mark.parametrize(
    ("relation", "expected"),
    [
        (every(5, 3), Congruence(5, 3)),
        (fold.equal(fold.mod(fold.sub(K, Q), fold.const(5)), fold.const(3)), Congruence(5, 2)),
        (fold.equal(fold.mod(fold.add(GAP, fold.const(4)), fold.const(5)), fold.const(3)), Congruence(5, 4)),
        (fold.equal(fold.const(2), fold.mod(fold.add(Q, fold.times(K, 6)), fold.const(7))), Congruence(7, 2)),
        (fold.conjunction(CAUSAL, every(4)), Congruence(4, 0)),
        (fold.equal(fold.mod(fold.add(Q, K), fold.const(5)), fold.const(0)), None),
        (fold.equal(fold.mod(Q, fold.const(5)), fold.const(0)), None),
        (fold.less(fold.mod(GAP, fold.const(5)), fold.const(2)), None),
        (fold.negation(every(5)), None),
        (CAUSAL, None),
    ],
)
def test_recognised_congruences(relation: Index, expected: Congruence | None) -> None:
    (part,) = split(relation)
    assert part.congruence == expected
    if expected is not None:
        seen = np.argwhere(exact_evaluation.mask(relation, (0, 40), (0, 40)))
        assert len(seen)
        assert ((seen[:, 0] - seen[:, 1] - expected.offset) % expected.divisor == 0).all()


def test_the_column_of_a_strided_pattern_is_a_formula_in_every_class() -> None:
    local, column = split(strided(128, 128))
    assert local.congruence is None
    classes = list(residues(column, 1000, 1000))
    assert len(classes) == 128
    assert {diagonal_shift(c.relation) for c in classes} == {-1}
    assert (classes[0].n_q, classes[127].n_q) == (8, 7)


@st.composite
def relations(draw: st.DrawFn) -> Index:
    """Draw unions of bands and combs, causal or not, perhaps restricted to a range."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        divisor = draw(st.integers(2, 9))
        comb = every(divisor, draw(st.integers(0, divisor - 1)))
        window = fold.less(fold.absolute(GAP), fold.const(draw(st.integers(1, 40))))
        sink = fold.less(K, fold.const(draw(st.integers(0, 9))))
        parts.append(
            draw(st.sampled_from([comb, window, fold.conjunction(comb, window), fold.conjunction(comb, sink)]))
        )
    relation = fold.disjunction(*parts)
    return fold.conjunction(CAUSAL, relation) if draw(st.booleans()) else relation


@given(relations(), st.integers(0, 70), st.integers(0, 70))
def test_parts_and_classes_are_the_relation(relation: Index, n_q: int, n_k: int) -> None:
    times = np.zeros((n_q, n_k), dtype=np.int64)
    for part in split(relation):
        if part.congruence is None:
            times += exact_evaluation.mask(part.relation, (0, n_q), (0, n_k))
            continue
        for c in residues(part, n_q, n_k):
            rows, keys = np.arange(c.row, n_q, c.divisor), np.arange(c.key, n_k, c.divisor)
            assert (len(rows), len(keys)) == (c.n_q, c.n_k)
            times[np.ix_(rows, keys)] += exact_evaluation.mask(c.relation, (0, c.n_q), (0, c.n_k))
    assert (times == exact_evaluation.mask(relation, (0, n_q), (0, n_k))).all()


@given(relations(), st.integers(1, 300), st.integers(1, 300), st.sampled_from(["float32", "bfloat16"]))
def test_the_plan_is_the_relation(relation: Index, n_q: int, n_k: int, dtype: str) -> None:
    chosen = choose(CoverProblem(relation, n_q, n_k, dtype, 64, 4, {}, AMX))
    truth = exact_evaluation.mask(relation, (0, n_q), (0, n_k))
    check_pieces(chosen.cover.pieces, chosen.cover.masks, truth)
    assert chosen.cover.visible in (None, int(truth.sum()))


def test_a_million_strided_tokens_are_a_few_pieces() -> None:
    n = 1 << 20
    chosen = choose(CoverProblem(strided(128, 128), n, n, "float32", 64, 4, {}, AMX))
    assert len(chosen.cover.pieces) <= 4
    assert chosen.cover.visible == sum(min(r + 1, 128) + max(0, (r - 128) // 128 + 1) for r in range(n))
