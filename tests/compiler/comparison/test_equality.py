"""Equality of relations: an equality proved for every length holds at longer lengths, and differences are found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnc.compiler.comparison.equality import deciding_length, first_difference
from attnc.compiler.ir import Index, fold

Q, K = fold.place("q"), fold.place("k")

numbers = st.integers(-12, 12).map(fold.const)
divisors = st.sampled_from([2, 3, 4, 6]).map(fold.const)


def grown(terms: st.SearchStrategy[Index]) -> st.SearchStrategy[Index]:
    return st.one_of(
        st.builds(fold.floordiv, terms, divisors),
        st.builds(fold.mod, terms, divisors),
        st.builds(fold.add, terms, numbers),
        st.builds(fold.absolute, terms),
        st.builds(fold.minimum, terms, numbers),
        st.builds(fold.maximum, terms, numbers),
    )


places = st.one_of(st.just(Q), st.just(K), st.just(fold.sub(Q, K)))
one_sided = st.recursive(places, grown, max_leaves=3)
conditions = st.one_of(
    st.builds(fold.less_equal, one_sided, numbers),
    st.builds(fold.equal, one_sided, numbers),
    st.builds(lambda d: fold.less_equal(fold.floordiv(K, d), fold.floordiv(Q, d)), divisors),
    st.just(fold.less_equal(K, Q)),
)
relations = st.recursive(
    conditions,
    lambda inner: st.one_of(
        st.builds(fold.conjunction, inner, inner),
        st.builds(fold.disjunction, inner, inner),
        st.builds(fold.negation, inner),
    ),
    max_leaves=4,
)


@given(relations, relations)
def test_the_deciding_length_decides(one: Index, other: Index) -> None:
    n = deciding_length([one, other])
    if n is None or n > 600:
        return
    found, longer = first_difference(one, other, n), first_difference(one, other, 3 * n + 7)
    assert (found is None) == (longer is None)


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([1, 2, 5]))
def test_windows_far_from_the_corner(near: int, far: int, step: int) -> None:
    """The relations differ only at distances of their own size."""
    gap = fold.sub(Q, K)
    one, other = (fold.less(fold.floordiv(gap, fold.const(step)), fold.const(w)) for w in (near, far))
    n = deciding_length([one, other])
    assert n is not None
    found = first_difference(one, other, n)
    assert (found is None) == (near == far)
    if found is not None:
        assert (found.q - found.k) // step == min(near, far)
        assert found.first == (near > far)


@pytest.mark.parametrize(
    "relation",
    [
        fold.less_equal(fold.add(Q, K), fold.const(7)),
        fold.less(fold.mul(Q, K), fold.const(50)),
        fold.less_equal(fold.floordiv(K, fold.const(2)), fold.floordiv(Q, fold.const(3))),
        fold.less(fold.function("bitlen", fold.sub(Q, K)), fold.const(4)),
        fold.equal(fold.mod(Q, fold.add(K, fold.const(1))), fold.const(0)),
        fold.less(fold.floordiv(fold.floordiv(Q, fold.const(5000)), fold.const(5000)), K),
    ],
    ids=["a sum", "a product", "quotients of two sizes", "a logarithm", "a divisor that moves", "large divisors"],
)
def test_equality_is_claimed_only_with_a_proof(relation: Index) -> None:
    assert deciding_length([relation]) is None


def test_the_reported_difference_is_the_first() -> None:
    one, other = fold.less_equal(K, Q), fold.less(K, Q)
    difference = first_difference(one, other, 10)
    assert difference is not None
    assert (difference.q, difference.k, difference.length, difference.first) == (0, 0, 10, True)
    assert first_difference(one, one, 10) is None
