"""Walks and rewrites of expressions; exact rationals as pairs of integers."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

import expression_trees as trees
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Const, Index, Position, fold
from attnc.compiler.ir.rewrite import (
    aggregate,
    rewrite,
    substitute,
    variables,
    walk,
)
from attnc.compiler.lowering import rational
from attnc.compiler.lowering.rational import Number
from expression_trees import Kit, Tree
from tiers import examples

Q, K = fold.place("q"), fold.place("k")


@settings(max_examples=examples(150))
@given(trees.truths(3, Kit()))
def test_an_unchanged_expression_is_the_same_object(tree: Tree) -> None:
    node = trees.build(tree)
    assert rewrite(node, lambda _: None) is node
    assert rewrite(node, lambda n: n) is node
    assert substitute(node, {fold.extent("keys"): Q}) is node


@settings(max_examples=examples(150))
@given(trees.truths(3, Kit()))
def test_operands_come_before_users(tree: Tree) -> None:
    seen: set[Index] = set()
    for node in walk(trees.build(tree)):
        assert node not in seen
        assert seen.issuperset(node.children())
        seen.add(node)


@settings(max_examples=examples(80))
@given(trees.truths(2, Kit(faults=False)), st.integers(-5, 5), st.integers(-5, 5))
def test_substitution_equals_building_with_other_leaves(tree: Tree, a: int, b: int) -> None:
    """Substituting numbers for positions gives the constant that plain Python gives."""

    def change(node: Index) -> Index | None:
        return fold.const(a if node.name == "q" else b) if isinstance(node, Position) else None

    node = rewrite(trees.build(tree), change)
    try:
        wanted = trees.value(tree, {"q": a, "k": b})
    except trees.Fault:
        return
    assert exact_evaluation.mask(node, (0, 1), (0, 1)).item() == wanted


def test_variables() -> None:
    i, j = fold.var("i", 1), fold.var("j", 2)
    inner = aggregate("any", j, Q, K, fold.truth(True), fold.equal(j, i))
    assert variables(inner) == {i, j}
    assert variables(Q) == frozenset()


# --- rationals -------------------------------------------------------------------------------------------------------

FRACTIONS = st.fractions(min_value=-20, max_value=20, max_denominator=12)


def number(x: Fraction, hidden: int) -> Number:
    """Return the number as constants, or over nodes that are constant only when evaluated at q = 0."""
    if not hidden:
        return rational.from_fraction(x)
    top = fold.add(Q, fold.const(x.numerator))
    below = fold.add(fold.const(x.denominator), fold.times(Q, hidden))
    return rational.Rational(top, below)


def value(x: Number) -> Fraction:
    """Evaluate the number at q = k = 0."""
    return Fraction(integer(rational.num(x)), integer(rational.den(x)))


def integer(node: Index) -> int:
    constant = substitute(node, {Q: fold.const(0), K: fold.const(0)})
    assert isinstance(constant, Const), constant
    return constant.value


@settings(max_examples=examples(150))
@given(FRACTIONS, FRACTIONS, st.integers(0, 2), st.integers(0, 2))
def test_rational_arithmetic(x: Fraction, y: Fraction, hide_x: int, hide_y: int) -> None:
    a, b = number(x, hide_x), number(y, hide_y)
    assert value(a) == x
    assert value(rational.add(a, b)) == x + y
    assert value(rational.sub(a, b)) == x - y
    assert value(rational.mul(a, b)) == x * y
    assert value(rational.neg(a)) == -x
    assert value(rational.absolute(a)) == abs(x)
    assert value(rational.minimum(a, b)) == min(x, y)
    assert value(rational.maximum(a, b)) == max(x, y)
    assert integer(rational.floor(a)) == x.numerator // x.denominator
    assert integer(rational.ceil(a)) == -(-x.numerator // x.denominator)
    if y:
        assert value(rational.div(a, b)) == x / y
        assert integer(rational.floordiv(a, b)) == x // y
        assert value(rational.mod(a, b)) == x % y


@settings(max_examples=examples(100))
@given(FRACTIONS, FRACTIONS, st.integers(0, 2))
def test_rational_comparisons(x: Fraction, y: Fraction, hide: int) -> None:
    a, b = number(x, hide), number(y, 0)
    for node, wanted in (
        (rational.less(a, b), x < y),
        (rational.less_equal(a, b), x <= y),
        (rational.equal(a, b), x == y),
        (rational.equal(a, a), True),
    ):
        assert exact_evaluation.mask(node, (0, 1), (0, 1)).item() == wanted
    chosen = rational.choice(fold.less(Q, fold.const(1)), a, b)
    assert value(chosen) == x


@settings(max_examples=examples(100))
@given(FRACTIONS, st.integers(-4, 4), st.booleans(), st.integers(0, 1))
def test_rational_powers(x: Fraction, exponent: int, constant: bool, hide: int) -> None:
    if x == 0 and exponent < 0:
        return
    e = fold.const(exponent) if constant else fold.add(Q, fold.const(exponent))
    assert value(rational.power(number(x, hide), e)) == x**exponent
