"""Triton text of integer expressions has the values of the exact evaluation, for negative operands too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import expression_trees as trees
from attnc.compiler.analysis.exact_evaluation import integers_at
from attnc.compiler.ir import Index, fold
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.kernels.index_text import (
    COLUMNS,
    HELPERS,
    ROWS,
    ExprText,
    IndexText,
    NotInKernelsError,
    fits_32_bits,
    is_nonnegative,
)
from attnc.spec.errors import EvaluationError
from expression_trees import Kit, Tree, build
from fake_triton import Array, evaluate
from tiers import examples

Q, K = np.arange(43, dtype=np.int64), np.arange(39, dtype=np.int64)
NAMES = {fold.place("q"): ExprText("query", ROWS), fold.place("k"): ExprText("key", COLUMNS)}


def value_of(node: Index, *, wide: bool = True) -> Array:
    """Evaluate an expression's text for all pairs, in 64 or 32 bits; raise NotInKernelsError where it has no text."""
    texts = IndexText(NAMES, _no_inputs)
    text = texts.of(node)
    kind = np.int64 if wide else np.int32
    values = evaluate(text.text, {"query": Q.astype(kind), "key": K.astype(kind)}, [HELPERS[n] for n in texts.helpers])
    if text.axes == ROWS:
        values = values[:, None]
    return np.broadcast_to(values, (len(Q), len(K)))


def _no_inputs(node: object, indices: object) -> ExprText:
    raise NotInKernelsError("inputs")


def true_value(node: Index) -> Array:
    return integers_at(node, Q, K, np.ones((len(Q), len(K)), dtype=np.bool_), wide=True)


def check(tree: Tree) -> None:
    node = build(tree)
    try:
        actual, true = value_of(node), true_value(node)
    except (NotInKernelsError, EvaluationError):
        assume(False)
        raise
    assert np.array_equal(actual.astype(np.int64), true)
    if fits_32_bits(node):
        assert np.array_equal(value_of(node, wide=False).astype(np.int64), true), "in 32 bits"
    for inner in walk(node):
        if is_nonnegative(inner):
            assert (true_value(inner) >= 0).all(), inner


@settings(max_examples=examples(300))
@given(trees.integers(3, Kit(faults=False, aggregates=False)))
def test_integers(tree: Tree) -> None:
    check(tree)


@settings(max_examples=examples(200))
@given(trees.truths(3, Kit(faults=False, aggregates=False)))
def test_truths(tree: Tree) -> None:
    check(tree)


OPERANDS = [
    trees.DELTA,
    Tree("sub", (trees.K, trees.number(17))),
    Tree("neg", (trees.Q,)),
    Tree("sub", (Tree("mul", (trees.number(3), trees.K)), Tree("mul", (trees.number(5), trees.Q)))),
    Tree("choice", (Tree("lt", (trees.Q, trees.number(9))), trees.number(-7), trees.K)),
]


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 8, 12, 64, -1, -3, -8])
@pytest.mark.parametrize("op", ["floordiv", "mod"])
@pytest.mark.parametrize("operand", OPERANDS, ids=str)
def test_division_rounds_down(operand: Tree, op: str, divisor: int) -> None:
    """Triton's own division rounds towards zero."""
    check(Tree(op, (operand, trees.number(divisor))))


@pytest.mark.parametrize("op", ["floordiv", "mod"])
def test_division_by_a_varying_divisor(op: str) -> None:
    for divisor in (Tree("add", (trees.K, trees.number(1))), Tree("sub", (trees.number(-1), trees.K))):
        check(Tree(op, (trees.DELTA, divisor)))


@given(st.integers(0, (1 << 31) - 1))
def test_bit_length(n: int) -> None:
    for kind in (np.int32, np.int64):
        found = evaluate("bit_length(n)", {"n": np.array([n], dtype=kind)}, [HELPERS["bit_length"]])
        assert found.item() == n.bit_length()


def test_the_triton_stand_in_truncates_like_triton() -> None:
    n = np.array([-7, 7, -7, 7], dtype=np.int32)
    d = np.array([3, 3, -3, -3], dtype=np.int32)
    assert evaluate("n // d", {"n": n, "d": d}, []).tolist() == [-2, 2, 2, -2]
    assert evaluate("n % d", {"n": n, "d": d}, []).tolist() == [-1, 1, -1, 1]


@pytest.mark.parametrize(
    "node",
    [
        fold.add(fold.times(fold.place("q"), 100_000), fold.place("k")),
        fold.mul(fold.place("q"), fold.place("k")),
        fold.mod(fold.mul(fold.place("q"), fold.add(fold.place("k"), fold.place("q"))), fold.const(1_000_003)),
    ],
    ids=["row by row", "product", "quotient"],
)
def test_wide_texts_are_right_past_32_bits(node: Index) -> None:
    """Offsets into inputs of more than 2^31 elements are right although their operands have 32 bits, as in kernels."""
    assert not fits_32_bits(node)
    q, k = (np.arange(65_000, 65_040, dtype=np.int32), np.arange(64_000, 64_040, dtype=np.int32))
    true = integers_at(node, q.astype(np.int64), k.astype(np.int64), np.ones((40, 40), dtype=np.bool_), wide=True)

    def found(texts: IndexText) -> Array:
        text = texts.of(node)
        value = evaluate(text.text, {"query": q, "key": k}, [HELPERS[n] for n in texts.helpers])
        return np.broadcast_to(value[:, None] if text.axes == ROWS else value, true.shape)

    narrow = IndexText(NAMES, _no_inputs)
    assert not np.array_equal(found(narrow).astype(np.int64), true)
    assert np.array_equal(found(narrow.wide()), true)
