"""Proofs by Presburger arithmetic: checked against every pair of many lengths; other relations are left undecided."""

from __future__ import annotations

from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnc.compiler.analysis.counted_isl import CountedIsl, UndecidedError
from attnc.compiler.comparison.equality import difference_at, first_difference
from attnc.compiler.comparison.presburger import TokenPair, first_point
from attnc.compiler.ir import Extent, Index, Pattern, fold
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.lowering.specialise import alone, of_any_length
from plan_calls import from_library, lowered

Q, K, N = fold.place("q"), fold.place("k"), fold.extent("keys")
LONGEST = 20


def c(value: int) -> Index:
    return fold.const(value)


# --- against every pair ----------------------------------------------------------------------------------------------

numbers = st.integers(-9, 9).map(c)
divisors = st.sampled_from([2, 3, 5, -2, 8]).map(c)
table = (3, 0, -1, 4)


def grown(terms: st.SearchStrategy[Index]) -> st.SearchStrategy[Index]:
    compared = st.builds(fold.less_equal, terms, numbers)
    return st.one_of(
        st.builds(fold.floordiv, terms, divisors),
        st.builds(fold.mod, terms, divisors),
        st.builds(fold.add, terms, terms),
        st.builds(fold.times, terms, st.integers(-3, 3)),
        st.builds(fold.absolute, terms),
        st.builds(fold.minimum, terms, terms),
        st.builds(fold.maximum, terms, numbers),
        st.builds(fold.choice, compared, terms, terms),
        st.builds(lambda x, s: fold.coord(x, c(1), c(s), c(3), "x"), terms, st.integers(1, 4)),
        st.builds(lambda x: fold.table_read(table, fold.mod(x, c(4))), terms),
        st.builds(lambda x: fold.function("bitlen", fold.mod(x, c(11))), terms),
        st.builds(lambda x: fold.floordiv(x, fold.maximum(fold.floordiv(N, c(2)), c(1))), terms),
        st.builds(lambda x: fold.mod(x, fold.add(N, c(1))), terms),
        st.builds(lambda x, y: fold.mul(fold.mod(x, c(3)), y), terms, terms),
    )


integers = st.recursive(st.one_of(st.sampled_from([Q, K, N, fold.sub(Q, K)]), numbers), grown, max_leaves=3)
conditions = st.one_of(
    st.builds(fold.less_equal, integers, integers), st.builds(fold.equal, integers, integers), st.just(fold.less(K, Q))
)
relations = st.recursive(
    conditions,
    lambda inner: st.one_of(
        st.builds(fold.conjunction, inner, inner),
        st.builds(fold.disjunction, inner, inner),
        st.builds(fold.negation, inner),
        st.builds(fold.choice, inner, inner, inner),
    ),
    max_leaves=4,
)


def rewritten(relation: Index) -> Index:
    """Write the relation differently, with another normal form."""
    wide = fold.less_equal(fold.add(Q, K), fold.times(N, 2))
    return fold.disjunction(fold.conjunction(relation, wide), fold.less(N, K))


def check(one: Index, other: Index, requirement: Index | None = None) -> bool:
    """Check that isl's answer is true for many lengths; return whether isl gave an answer."""
    try:
        point = first_point(one, other, () if requirement is None else (requirement,))
    except UndecidedError:
        return False
    if point is not None:
        n = point.length
        assert requirement is None or alone(requirement, n) is fold.truth(True)
        assert difference_at(alone(one, n), alone(other, n), n, point.q, point.k) is not None
        return True
    for n in (*range(1, LONGEST), 47):
        if requirement is None or alone(requirement, n) is fold.truth(True):
            assert first_difference(alone(one, n), alone(other, n), n) is None, f"among {n} tokens"
    return True


@given(relations, relations)
def test_two_relations(one: Index, other: Index) -> None:
    check(one, other)


@given(relations)
def test_a_relation_and_another_text_for_it(relation: Index) -> None:
    if check(relation, rewritten(relation)):
        assert first_point(relation, rewritten(relation), ()) is None


@given(relations, st.integers(0, 70), st.integers(0, 70))
def test_a_relation_but_for_one_query_or_key(relation: Index, q: int, n: int) -> None:
    """The pair may lie at a length that is not enumerated."""
    far = fold.conjunction(fold.equal(Q, c(q)), fold.less_equal(c(n), N))
    check(relation, fold.disjunction(relation, far))
    check(relation, fold.disjunction(relation, far), fold.less(N, c(20)))


@given(relations, relations, st.integers(2, 5), st.integers(0, 4))
def test_requirements_on_lengths(one: Index, other: Index, step: int, rest: int) -> None:
    check(one, fold.conjunction(one, other), fold.equal(fold.mod(N, c(step)), c(rest % step)))


near = st.integers(1, 9).map(c)
simple = st.one_of(
    st.builds(lambda w: fold.less(fold.sub(Q, K), w), near),
    st.builds(lambda d, r: fold.equal(fold.mod(fold.sub(Q, K), d), fold.mod(r, d)), near, near),
    st.builds(lambda d: fold.less_equal(fold.floordiv(K, d), fold.floordiv(Q, d)), near),
    st.builds(lambda w: fold.less_equal(fold.sub(N, w), K), near),
    st.builds(lambda w: fold.less(fold.minimum(fold.maximum(Q, w), fold.sub(N, w)), K), near),
)
pairs_of_simple = st.builds(
    lambda join, a, b: join(a, b), st.sampled_from([fold.conjunction, fold.disjunction]), simple, simple
)


@given(pairs_of_simple, pairs_of_simple)
def test_the_reported_pair_is_the_first(one: Index, other: Index) -> None:
    """Pairs are ordered by length, query and key: no earlier pair differs, and isl finds the first pair in time."""
    point = first_point(one, other, (), 20.0)
    for n in range(1, 30 if point is None else point.length + 1):
        found = first_difference(alone(one, n), alone(other, n), n)
        assert (found is not None) == (point is not None and n == point.length)
        if found is not None:
            assert point == TokenPair(n, found.q, found.k)


def test_most_drawn_relations_are_decided() -> None:
    """Otherwise the tests of drawn relations would hold vacuously."""
    decided: list[bool] = []

    @given(relations)
    def look(relation: Index) -> None:
        decided.append(check(relation, fold.conjunction(relation, fold.less_equal(K, Q))))

    look()
    assert sum(decided) >= 0.6 * len(decided), f"{sum(decided)} of {len(decided)}"


# --- relations that are equal for every length ------------------------------------------------------------------------


def pattern_of(source: str, **parameters: object) -> Pattern:
    return (lowered if "\n" in source else from_library)(source, **parameters)


def first_difference_of(one: str, other: str, **parameters: object) -> TokenPair | None:
    """Return the first pair on which two texts or library patterns differ; the parameters are for `one`."""
    patterns = pattern_of(one, **parameters), pattern_of(other)
    relations = [of_any_length(pattern.attend.visible) for pattern in patterns]
    required = [of_any_length(condition) for pattern in patterns for condition, _ in pattern.requirements]
    assert relations[0] is not relations[1]
    return first_point(relations[0], relations[1], required)


def text(visible: str, require: str = "keys >= 1") -> str:
    return f"pattern other\n    require {require}\n    visible {visible}\n"


NATTEN = """pattern other
    require {reach} <= keys
    let size = (keys - q % {d} + {d} - 1) // {d}
    let leader = min(q // {d} // {s} * {s} + {s} // 2, size - 1)
    let first = max(0, min(leader - {w} // 2, size - {w}))
    visible (q - k) % {d} == 0 and first <= k // {d} <= first + {w} - 1
"""


@pytest.mark.parametrize(
    ("window", "stride", "dilation"),
    [(7, 1, 1), (7, 2, 1), (8, 4, 2), (7, 3, 3), (13, 5, 4), (128, 16, 1), (9, 2, 8), (64, 1, 16)],
)
def test_neighbourhoods_written_in_two_ways(window: int, stride: int, dilation: int) -> None:
    """The clamp is a maximum of a minimum or a minimum of a maximum; the residue's size takes one division or two."""
    other = NATTEN.format(w=window, s=stride, d=dilation, reach=window * dilation)
    assert first_difference_of("neighborhood_1d", other, window=window, stride=stride, dilation=dilation) is None


def test_neighbourhoods_of_freeswim() -> None:
    """An odd window that moves inward: up to `reach` keys on each side, and the missing ones on the other side."""
    other = text("abs(min(max(q, 5), keys - 6) - k) <= 5", "keys >= 11")
    assert first_difference_of("neighborhood_1d", other, window=11) is None


BLOCKS = "q // 8 == k // 8"


def test_stride_as_long_as_the_window_is_blocks_where_they_fit() -> None:
    assert first_difference_of("neighborhood_1d", text(BLOCKS, "keys % 8 == 0"), window=8, stride=8) is None
    assert first_difference_of("neighborhood_1d", text(BLOCKS), window=8, stride=8) == TokenPair(9, 8, 1)


def test_a_causal_neighbourhood_is_a_causal_window() -> None:
    assert first_difference_of("neighborhood_1d", text("0 <= q - k < 500"), window=500, causal=True) is None


def test_neighbourhoods_far_from_the_ends_are_windows() -> None:
    inside = text("abs(q - k) <= 3 if 3 <= q < keys - 3 else k < 7 if q < 3 else k >= keys - 7", "keys >= 7")
    assert first_difference_of("neighborhood_1d", inside) is None


def test_streaming_is_a_window_with_sinks() -> None:
    window = text("k <= q and (q - k < 1000 or k < 4)")
    assert first_difference_of("streaming", window, window=1000, sinks=4) is None


def test_halves_and_quarters_of_the_length() -> None:
    """Quotients and remainders by a length whose values are small numbers."""
    halves = """pattern other
    require keys % 2 == 0
    let half = keys // 2
    let i = (q if q < half else q - half) // 4
    let j = (k if k < half else k - half) // 4
    let of_noise = i == j if k < half else i > j
    visible of_noise if q < half else i >= j and k >= half
"""
    assert first_difference_of("block_diffusion", halves, block=4) is None
    quarters = text("any(keys * i <= 4 * q < keys * (i + 1) and keys * i <= 4 * k < keys * (i + 1) for i in 4)")
    groups = text("q // (keys // 4) == k // (keys // 4)", "keys % 4 == 0 and keys > 0")
    assert first_difference_of(groups, quarters) is None


def test_the_end_of_a_segment_by_remainder_or_quotient() -> None:
    other = text("k <= q and (q // 128 == k // 128 or k % 128 >= 96)")
    assert first_difference_of("sparse_fixed", other) is None


# --- relations that differ far away -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "first"),
    [
        ("k <= q and (keys < 5000 or k != 17)", TokenPair(5000, 17, 17)),
        ("k <= q and q < 5000", TokenPair(5001, 5000, 0)),
        ("k <= q and (q % 1009 != 7 or k % 1013 != 8 or q < 9000)", TokenPair(9089, 9088, 8)),
        ("k <= q and (keys % 97 != 3 or keys % 101 != 5)", TokenPair(4853, 0, 0)),
        ("k <= q and (keys < 10 ** 12 or q - k < 10 ** 11)", TokenPair(10**12, 10**11, 0)),
    ],
)
def test_differences_that_only_long_calls_show(other: str, first: TokenPair) -> None:
    difference = first_difference_of("causal", text(other))
    assert difference == first
    one, changed = (alone(pattern_of(p).attend.visible, difference.length) for p in ("causal", text(other)))
    assert difference_at(one, changed, difference.length, difference.q, difference.k) is not None
    if difference.length < 10_000:
        for n, equal in ((difference.length - 1, True), (difference.length, False)):
            one, changed = (alone(pattern_of(p).attend.visible, n) for p in ("causal", text(other)))
            assert (first_difference(one, changed, n) is None) == equal


# --- undecided relations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relation", "says"),
    [
        (fold.less(fold.mul(Q, K), c(50)), "a product is beyond"),
        (fold.less(fold.function("bitlen", fold.sub(Q, K)), c(4)), "a logarithm is beyond"),
        (fold.less(fold.function("isqrt", N), Q), "a square root is beyond"),
        (fold.less(fold.power(c(2), Q), K), "a power is beyond"),
        (fold.equal(fold.mod(K, fold.add(Q, c(1))), c(0)), "may be out of range"),
        (fold.equal(fold.mod(K, fold.floordiv(N, c(4))), c(0)), "may be out of range"),
        (fold.equal(fold.table_read((1, 2, 3), Q), K), "may be out of range"),
        (fold.equal(fold.floordiv(K, c(0)), c(0)), "division by zero"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_relations_beyond_presburger_arithmetic(relation: Index, says: str) -> None:
    with pytest.raises(UndecidedError, match=says):
        first_point(relation, fold.conjunction(relation, fold.less_equal(K, fold.add(N, N))), ())


def test_a_fault_in_an_unread_value_is_ignored() -> None:
    entry = fold.equal(fold.table_read((1, 2, 3), Q), K)
    guarded = fold.conjunction(fold.less(Q, c(3)), entry)
    other = fold.conjunction(fold.less(Q, c(3)), fold.equal(fold.add(Q, c(1)), K))
    assert first_point(guarded, other, ()) is None
    assert first_point(fold.negation(guarded), fold.negation(other), ()) is None


def test_no_length_is_allowed() -> None:
    with pytest.raises(UndecidedError, match="refuses every length"):
        first_point(fold.less(K, Q), fold.less(Q, K), (fold.less(N, c(1)),))


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_proofs_that_take_long_are_given_up(seconds: float) -> None:
    """The limit is kept up to the duration of the last step, with a margin for slow machines."""
    terms = [fold.mod(fold.add(fold.times(Q, a), fold.times(K, -b), N), c(a * b + 1)) for a in (3, 5) for b in (7, 9)]
    hard = fold.less(fold.minimum(*terms), fold.maximum(*(fold.absolute(fold.sub(t, K)) for t in terms)))
    also = fold.less(fold.maximum(*terms), fold.minimum(*(fold.absolute(fold.sub(t, Q)) for t in terms)))
    start = monotonic()
    with pytest.raises(UndecidedError, match="takes too long"):
        first_point(fold.conjunction(hard, also), fold.disjunction(hard, also), (), seconds)
    assert monotonic() - start < seconds + 5


def test_a_difference_is_reported_even_if_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference is then reported as a difference, not as the first one."""
    monkeypatch.setattr(CountedIsl, "_least", _no_time)
    difference = first_point(fold.less_equal(K, Q), fold.less(K, Q), ())
    assert difference is not None
    assert difference.q == difference.k


def _no_time(*_: object) -> None:
    raise UndecidedError("isl takes too long")


def test_the_length_stays_open() -> None:
    relation = fold.less(fold.add(Q, fold.extent("queries"), fold.head_index("head")), fold.extent("heads"))
    sizes = [n for n in walk(of_any_length(relation, 3, 8)) if isinstance(n, Extent)]
    assert sizes == [N]
