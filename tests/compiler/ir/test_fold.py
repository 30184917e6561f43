"""Folding: values equal plain Python's, normal forms are unique, and equal structures are one object."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import expression_trees as trees
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Arith, Const, Index, Linear, Reduce, Truth, fold
from attnc.compiler.ir.rewrite import UNROLL, aggregate, rebuild, walk
from attnc.spec.errors import EvaluationError
from expression_trees import Kit, Tree
from tiers import examples

N_Q, N_K = 7, 9
Q, K = fold.place("q"), fold.place("k")


def rebuilt(root: Index) -> Index:
    """Rebuild `root` with every node made by its constructor, without the shortcut for unchanged operands."""
    from attnc.compiler.ir import rewrite

    done: dict[Index, Index] = {}
    for node in walk(root):
        children = tuple(done[child] for child in node.children())
        done[node] = rewrite._build(node, children) if children else node
    return done[root]


def same_values(tree: Tree, node: Index) -> None:
    """The node has the tree's value wherever the tree has a value."""
    wanted = trees.mask(tree, N_Q, N_K)
    has_value = np.array([[cell is not None for cell in row] for row in wanted])
    truth = np.array([[bool(cell) for cell in row] for row in wanted])
    try:
        assert (exact_evaluation.mask(node, (0, N_Q), (0, N_K)) == truth)[has_value].all()
    except EvaluationError:
        assert not has_value.all()
        for q, k in np.argwhere(has_value).tolist():
            assert exact_evaluation.mask(node, (q, q + 1), (k, k + 1)).item() == truth[q, k]


@settings(max_examples=examples(150))
@given(trees.truths(3, Kit()))
def test_values(tree: Tree) -> None:
    same_values(tree, trees.build(tree))


@settings(max_examples=examples(40))
@given(trees.integers(3, Kit()))
def test_integer_values(tree: Tree) -> None:
    """Compare the bits of the value, so that no comparison folds with the expression."""
    node = trees.build(tree)
    for bit in range(6):
        low = Tree("mod", (Tree("floordiv", (tree, trees.number(2**bit))), trees.number(2)))
        divided = fold.function("bitand", node, fold.const(1 << bit))
        same_values(Tree("eq", (low, trees.number(1))), fold.negation(fold.zero(divided)))


@settings(max_examples=examples(150))
@given(trees.truths(3, Kit()))
def test_folding_is_idempotent(tree: Tree) -> None:
    node = trees.build(tree)
    assert rebuilt(node) is node


@settings(max_examples=examples(100))
@given(trees.truths(3, Kit()))
def test_equal_structure_is_one_object(tree: Tree) -> None:
    node = trees.build(tree)
    assert trees.build(tree) is node
    assert rebuild(node, node.children()) is node


@settings(max_examples=examples(100))
@given(trees.integers(2, Kit()), trees.integers(2, Kit()), trees.integers(2, Kit()))
def test_sums_are_associative_and_commutative(x: Tree, y: Tree, z: Tree) -> None:
    a, b, c = trees.build(x), trees.build(y), trees.build(z)
    assert fold.add(a, b, c) is fold.add(c, fold.add(b, a))
    assert fold.sub(fold.add(a, b), b) is a
    assert fold.sub(a, a) is fold.const(0)
    assert fold.times(fold.sub(a, b), -1) is fold.sub(b, a)


@settings(max_examples=examples(100))
@given(trees.integers(2, Kit()), trees.integers(2, Kit()))
def test_comparisons_have_one_form(x: Tree, y: Tree) -> None:
    a, b = trees.build(x), trees.build(y)
    assert fold.less(a, b) is fold.negation(fold.less_equal(b, a))
    assert fold.equal(a, b) is fold.equal(b, a)
    assert fold.less_equal(fold.times(a, 3), fold.times(b, 3)) is fold.less_equal(a, b)
    assert fold.equal(fold.add(a, fold.const(4)), fold.add(b, fold.const(4))) is fold.equal(a, b)


def test_quotient_and_remainder_recombine() -> None:
    c = fold.const(64)
    whole = fold.add(fold.times(fold.floordiv(Q, c), 64), fold.mod(Q, c))
    assert whole is Q
    assert fold.floordiv(fold.add(fold.times(Q, 64), fold.const(63)), c) is Q
    assert fold.mod(fold.add(fold.times(Q, 64), fold.const(65)), c) is fold.const(1)
    assert fold.floordiv(fold.floordiv(Q, fold.const(4)), fold.const(16)) is fold.floordiv(Q, c)
    assert fold.floordiv(fold.mod(Q, fold.const(5)), c) is fold.const(0)


@pytest.mark.parametrize("divisor", [-7, -1, 1, 2, 64])
@pytest.mark.parametrize("value", [-65, -64, -1, 0, 1, 63, 64, 65])
def test_division_floors(value: int, divisor: int) -> None:
    assert fold.floordiv(fold.const(value), fold.const(divisor)) is fold.const(value // divisor)
    assert fold.mod(fold.const(value), fold.const(divisor)) is fold.const(value % divisor)


def test_expressions_without_a_value_stay() -> None:
    zero = fold.const(0)
    for node in (fold.floordiv(Q, zero), fold.mod(Q, zero), fold.power(Q, fold.const(-1))):
        assert not isinstance(node, Const)
    for node in (fold.power(fold.const(2), fold.const(99)), fold.function("isqrt", fold.const(-1))):
        with pytest.raises(EvaluationError):
            exact_evaluation.mask(fold.zero(node), (0, 1), (0, 1))


def test_short_aggregates_are_unrolled() -> None:
    i = fold.var("i", 1)
    body = fold.equal(fold.sub(Q, K), fold.times(i, 4))
    short = aggregate("any", i, fold.const(0), fold.const(UNROLL), fold.truth(True), body)
    long = aggregate("any", i, fold.const(0), fold.const(UNROLL + 1), fold.truth(True), body)
    assert not isinstance(short, Reduce)
    assert isinstance(long, Reduce)
    assert (exact_evaluation.mask(short, (0, 9), (0, 9)) == exact_evaluation.mask(long, (0, 9), (0, 9))).all()
    nothing = aggregate("any", i, fold.const(3), fold.const(3), fold.truth(True), body)
    assert nothing is fold.truth(False)


def test_terms_come_in_one_order() -> None:
    terms = [(fold.floordiv(Q, fold.const(n)), n) for n in range(2, 9)]
    forward, backward = fold.linear(terms, 5), fold.linear(reversed(terms), 5)
    assert forward is backward
    assert isinstance(forward, Linear)
    digests = [term.digest for term, _ in forward.terms]
    assert digests == sorted(digests)


PROGRAM = """
from attnc.compiler.ir import fold
from attnc.compiler.ir.rewrite import aggregate
q, k = fold.place("q"), fold.place("k")
i = fold.var("i", 2)
gap = fold.absolute(fold.sub(q, k))
near = fold.less(fold.floordiv(gap, fold.const(7)), fold.maximum(fold.mod(q, fold.const(3)), k))
some = aggregate("any", i, fold.const(0), fold.add(q, fold.const(1)), near, fold.equal(fold.mul(i, k), q))
table = fold.table_read((3, 1, 2), fold.head_index("head"))
print(fold.disjunction(near, some, fold.less(table, fold.extent("keys"))).digest.hex())
"""


def test_digests_are_the_same_in_every_process() -> None:
    import os

    def digest(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    digests = {digest(seed) for seed in ("0", "1")}
    assert len(digests) == 1
    assert len(digests.pop()) == 32


@given(st.booleans(), st.booleans())
def test_truths_fold_away(a: bool, b: bool) -> None:
    x, y = fold.truth(a), fold.truth(b)
    seen = fold.less_equal(K, Q)
    assert fold.conjunction(x, y) is fold.truth(a and b)
    assert fold.disjunction(x, y) is fold.truth(a or b)
    assert fold.choice(x, y, fold.negation(y)) is fold.truth(b if a else not b)
    assert fold.choice(seen, x, fold.negation(x)) is (seen if a else fold.negation(seen))
    assert isinstance(fold.negation(x), Truth)
    assert fold.negation(fold.negation(seen)) is seen


@settings(max_examples=examples(80))
@given(
    st.sampled_from(["any", "all", "sum", "count"]),
    st.integers(1, 5),
    st.sampled_from([trees.Q, trees.K, trees.DELTA, trees.number(2)]),
    st.sampled_from([trees.Q, trees.number(1), Tree("sub", (trees.K, trees.number(3)))]),
)
def test_a_condition_on_a_quotient_narrows_the_range(op: str, divisor: int, rest: Tree, quotient: Tree) -> None:
    """`… for i in low .. high if (i + rest) // divisor == quotient` runs only over the matching part of the range."""
    i = trees.name("i")
    asked = Tree("eq", (Tree("floordiv", (Tree("add", (i, rest)), trees.number(divisor))), quotient))
    more = Tree("and", (Tree("lt", (i, trees.number(70))), asked))
    body = Tree("sub", (i, trees.Q)) if op == "sum" else Tree("le", (i, trees.K))
    for condition in (asked, more):
        low, high = Tree("sub", (trees.number(0), trees.K)), Tree("add", (trees.Q, trees.number(90)))
        tree = Tree(op, (low, high, condition, body), name="i")
        node = trees.build(tree if op in ("any", "all") else Tree("eq", (tree, trees.number(1))))
        (found,) = (n for n in walk(node) if isinstance(n, Reduce))
        assert not any(isinstance(n, Arith) and n.op == "floordiv" for n in walk(found.condition))
        same_values(tree if op in ("any", "all") else Tree("eq", (tree, trees.number(1))), node)


def test_bounds_that_cross() -> None:
    q_low, q_high = fold.less_equal(fold.const(5), Q), fold.less(Q, fold.const(5))
    assert fold.conjunction(q_low, fold.less(K, Q), q_high) is fold.truth(False)
    assert fold.disjunction(q_low, fold.less(K, Q), q_high) is fold.truth(True)
    touching = fold.less_equal(Q, fold.const(5))
    assert len(fold.conjunction(q_low, touching).children()) == 2
    apart = fold.disjunction(fold.less(Q, fold.const(5)), fold.less(fold.const(5), Q))
    assert len(apart.children()) == 2
