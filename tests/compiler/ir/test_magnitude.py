"""The quick bound never calls numbers small when interval analysis or a value shows that they are large."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import expression_trees as trees
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Index, fold
from attnc.compiler.ir.magnitude import LIMIT, is_small
from expression_trees import Tree
from relations import relations

Q, K = fold.place("q"), fold.place("k")


@given(relations(), st.integers(1, 60))
def test_small_relations_are_evaluated_alike_in_64_bits(tree: Tree, n: int) -> None:
    relation = trees.build(tree)
    assume(is_small(relation, n))
    narrow = exact_evaluation.mask(relation, (0, n), (0, n), wide=False)
    wide = exact_evaluation.mask(relation, (0, n), (0, n), wide=True)
    assert (narrow == wide).all()


@pytest.mark.parametrize(
    ("node", "places", "small"),
    [
        (Q, LIMIT - 1, True),
        (Q, LIMIT, False),
        (fold.mul(Q, K), 1 << 29, True),
        (fold.mul(Q, K), 1 << 30, False),
        (fold.times(Q, 1 << 40), 1 << 19, True),
        (fold.times(Q, 1 << 40), 1 << 20, False),
        (fold.times(fold.absolute(fold.sub(Q, K)), 1 << 40), 1 << 18, True),
        (fold.coord(Q, fold.const(1 << 59), fold.const(2), None, "x"), 1 << 59, False),
        (fold.less(fold.minimum(Q, fold.const(1 << 61)), K), 8, False),
        (fold.power(fold.const(2), Q), 8, False),
    ],
)
def test_small_numbers_are_recognised(node: Index, places: int, small: bool) -> None:
    assert is_small(node, places) is small
