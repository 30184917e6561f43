"""Exact masks: guards, overflow, faults and the positions of faults."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Data, Index, fold
from attnc.compiler.ir.rewrite import aggregate
from attnc.spec.errors import EvaluationError
from attnc.spec.source import SourceFile, Span

Q, K = fold.place("q"), fold.place("k")
CAUSAL = fold.less_equal(K, Q)


def grid(relation: Index, n_q: int = 6, n_k: int = 6) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return exact_evaluation.mask(relation, (0, n_q), (0, n_k))


def test_a_part_of_the_grid() -> None:
    assert (
        exact_evaluation.mask(CAUSAL, (3, 5), (2, 6)) == [[True, True, False, False], [True, True, True, False]]
    ).all()
    assert exact_evaluation.mask(CAUSAL, (3, 3), (0, 6)).shape == (0, 6)
    assert exact_evaluation.mask(fold.truth(True), (0, 2), (0, 3)).all()


def test_a_mask_is_dense_and_writable() -> None:
    mask = exact_evaluation.mask(fold.less_equal(K, fold.const(2)), (0, 4), (0, 4))
    assert mask.flags.c_contiguous
    assert mask.shape == (4, 4)


GUARDED: dict[str, Callable[[Index, Index], Index]] = {
    "and": fold.conjunction,
    "or": lambda good, bad: fold.disjunction(fold.negation(good), bad),
    "if": lambda good, bad: fold.choice(good, bad, fold.equal(Q, fold.const(77))),
    "if, an integer": lambda good, bad: fold.less(fold.choice(good, fold.choice(bad, Q, K), Q), fold.const(3)),
}
FAULTS: dict[str, Index] = {
    "division": fold.equal(fold.mod(K, fold.sub(Q, fold.const(2))), fold.const(0)),
    "root": fold.less(fold.function("isqrt", fold.sub(Q, fold.const(3))), K),
    "index": fold.equal(fold.data_read(Data("x", np.arange(6)), (fold.sub(Q, fold.const(3)),)), K),
    "exponent": fold.less(fold.power(fold.add(K, fold.const(2)), fold.sub(Q, fold.const(3))), fold.const(9)),
    "overflow": fold.less(fold.power(fold.const(2), fold.times(fold.sub(fold.const(5), Q), 40)), fold.const(9)),
    "nothing": fold.less(
        aggregate(
            "max", fold.var("i", 5), fold.const(0), fold.sub(Q, fold.const(2)), fold.truth(True), fold.var("i", 5)
        ),
        K,
    ),
}


@pytest.mark.parametrize("guard", GUARDED)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_count_only_where_their_value_is_read(guard: str, fault: str) -> None:
    """Row 2 (exponent, overflow and root: rows below 3) has no value; rows from 4 on always have a value."""
    bad = FAULTS[fault]
    with pytest.raises(EvaluationError, match="at query row"):
        grid(bad)
    guarded = GUARDED[guard](fold.less_equal(fold.const(4), Q), bad)
    inside = exact_evaluation.mask(bad, (4, 6), (0, 6))
    whole = grid(guarded)
    if guard != "if, an integer":
        assert (whole[4:] == inside).all()


def test_a_fault_names_its_position() -> None:
    node = fold.mod(K, fold.sub(Q, fold.const(2)))
    source = SourceFile("here.attn", "visible k % (q - 2) == 0")
    with pytest.raises(EvaluationError, match=r"A901.*division by zero, at query row 2 and key 0\n.*1:9") as caught:
        exact_evaluation.mask(fold.zero(node), (0, 6), (0, 6), {node: Span(source, 8, 19)})
    assert caught.value.span == Span(source, 8, 19)


@pytest.mark.parametrize("power", [59, 60, 61, 62])
@pytest.mark.parametrize("sign", [-1, 1])
def test_numbers_near_64_bits_are_exact(power: int, sign: int) -> None:
    big = sign * ((1 << power) - 3)
    relation = fold.less(fold.add(fold.times(Q, 1), fold.const(big)), fold.add(K, fold.const(sign * (1 << power))))
    wanted = [[q + big < k + sign * (1 << power) for k in range(6)] for q in range(6)]
    assert (grid(relation) == wanted).all()
    scaled = fold.less(
        fold.mul(fold.add(K, fold.const(1)), fold.add(Q, fold.const(1 << (power - 4)))), fold.const(1 << power)
    )
    wanted = [[(k + 1) * (q + (1 << (power - 4))) < 1 << power for k in range(6)] for q in range(6)]
    assert (grid(scaled) == wanted).all()


@pytest.mark.parametrize(
    "relation",
    [
        fold.less(fold.mul(fold.add(K, fold.const(1)), fold.add(Q, fold.const((1 << 63) - 3))), fold.const(0)),
        fold.less(fold.power(fold.add(K, fold.const(-3)), fold.const(63)), Q),
        fold.less(fold.mul(fold.mul(fold.times(Q, 1 << 31), fold.times(K, 1 << 31)), fold.add(Q, K)), K),
        fold.less(fold.times(Q, 1 << 70), K),
    ],
    ids=["mul", "pow", "nested", "coefficient"],
)
def test_overflow_raises_instead_of_wrapping(relation: Index) -> None:
    with pytest.raises(EvaluationError, match="64 bits"):
        grid(relation)


def test_a_coefficient_past_64_bits_on_zeros() -> None:
    """Only row 0 is evaluated; its product is 0."""
    relation = fold.less_equal(fold.times(fold.mul(Q, K), 1 << 70), Q)
    assert exact_evaluation.mask(relation, (0, 1), (0, 6)).all()


@pytest.mark.parametrize(
    "n", [0, 1, 2, 3, 4, (1 << 52) - 1, 1 << 52, (1 << 53) - 1, (1 << 53) + 1, (1 << 60) - 1, 1 << 60]
)
def test_bit_lengths_and_roots(n: int) -> None:
    from math import isqrt

    number = fold.add(fold.times(Q, 0), fold.const(n), K)
    for k in range(3):
        for op, wanted in (("bitlen", (n + k).bit_length()), ("isqrt", isqrt(n + k))):
            node = fold.function(op, number)
            assert exact_evaluation.mask(fold.equal(node, fold.const(wanted)), (0, 1), (k, k + 1)).all()


def test_aggregates_whose_range_is_empty_in_some_lanes() -> None:
    i = fold.var("i", 3)
    near = aggregate(
        "any", i, K, fold.sub(Q, fold.const(1)), fold.truth(True), fold.equal(fold.mod(i, fold.const(3)), fold.const(0))
    )
    wanted = [[any(i % 3 == 0 for i in range(k, q - 1)) for k in range(9)] for q in range(9)]
    assert (grid(near, 9, 9) == wanted).all()
    total = aggregate("sum", i, K, Q, fold.less(i, fold.const(4)), i)
    wanted = [[sum(i for i in range(k, q) if i < 4) == 5 for k in range(9)] for q in range(9)]
    assert (grid(fold.equal(total, fold.const(5)), 9, 9) == wanted).all()
