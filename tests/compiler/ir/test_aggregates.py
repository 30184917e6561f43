"""Aggregates: computed once per distinct operand, and refused with their position where they would take long."""

from __future__ import annotations

import numpy as np
import pytest

from attnc import compile_attention
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.ir import Const, Index, Reduce, aggregates, array_evaluator, fold, intern
from attnc.compiler.ir.rewrite import aggregate, walk
from attnc.spec.diagnostics import Diagnostic
from attnc.spec.errors import AttncError, EvaluationError


def pattern(visible: str) -> str:
    return f"pattern p\n    align end\n    visible {visible}\n"


HOSTILE = {
    "a long sum": "0 <= q - k < sum(j for j in 0 .. 1000000000)",
    "sums of sums": "0 <= q - k < sum(sum(i * j for j in 0 .. 10000) for i in 0 .. 10000)",
    "a set of distances": "k <= q and any(q - k == j * j for j in 0 .. 100000)",
    "a set of two loops": "k <= q and any(q - k == i * j for i in 0 .. 30000, j in 0 .. 30000)",
    "numbers beyond 64 bits": "0 <= q - k < sum(j ** 9 for j in 0 .. 1000000)",
    "a range by the query": "0 <= q - k < sum(sum(i for i in 0 .. j) for j in 0 .. q * q * q)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_long_aggregates_are_refused_with_their_position(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregates, "MOST_STEPS", aggregates.MOST_STEPS >> 4)  # keeps the test below a second
    attend = compile_attention(pattern(HOSTILE[name]))
    with pytest.raises(EvaluationError, match="A908") as caught:
        attend.plan(1000)
    diagnostics: tuple[Diagnostic, ...] = caught.value.diagnostics
    (diagnostic,) = diagnostics
    assert diagnostic.primary.span.line == 3
    assert diagnostic.primary.span.text.split("(")[0] in ("sum", "any")
    assert "make the range shorter" in diagnostic.help


def test_steps_of_all_tiles_of_a_plan_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregates, "MOST_STEPS", 1 << 21)  # more than one tile takes, fewer than all tiles take
    attend = compile_attention(pattern("k <= q and any((q * k - j) % 7919 == 5 for j in 0 .. 100)"))
    attend.plan(64)
    with pytest.raises(AttncError, match="A908"):
        attend.plan(512)


def test_an_aggregate_of_constants_is_a_constant() -> None:
    attend = compile_attention(pattern("0 <= q - k < sum(j % 7 for j in 0 .. 1000) % 100"))
    assert not [node for node in walk(attend._pattern.attend.visible) if isinstance(node, Reduce)]
    assert attend.plan(500).visible == sum(min(n + 1, 2997 % 100) for n in range(500))


def test_loops_too_long_to_unroll_stay_loops() -> None:
    a, b, c = (f"{name} in 0 .. 60" for name in "abc")
    attend = compile_attention(pattern(f"k <= q and any((q * a + k * b) % 97 == c for {a}, {b}, {c})"))
    nodes = walk(attend._pattern.attend.visible)
    assert any(isinstance(node, Reduce) for node in nodes)
    assert len(nodes) < 1 << 17


def counted_lanes(monkeypatch: pytest.MonkeyPatch, body: Index, rows: int, keys: int) -> int:
    """Count lanes times trips of `sum(body for i in 0 .. 100)` on some rows and keys, whose values are checked."""
    i = fold.var("i", 1)
    node = intern(Reduce("sum", i, fold.const(0), fold.const(100), fold.truth(True), fold.mul(body, i)))
    taken: list[int] = []
    monkeypatch.setattr(array_evaluator, "spend", lambda node, trips, lanes, origins, wide: taken.append(trips * lanes))
    sums = exact_evaluation.integers(node, (0, rows), (0, keys))
    each = exact_evaluation.integers(body, (0, rows), (0, keys))
    assert np.array_equal(sums, each * 4950)
    return sum(taken)


def test_an_aggregate_is_evaluated_once_per_distinct_row_or_key(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = fold.place("q"), fold.place("k")
    assert counted_lanes(monkeypatch, fold.const(3), 40, 30) == 100
    assert counted_lanes(monkeypatch, q, 40, 30) == 100 * 40
    assert counted_lanes(monkeypatch, k, 40, 30) == 100 * 30
    assert counted_lanes(monkeypatch, fold.add(q, k), 40, 30) == 100 * 40 * 30


def test_a_fault_names_a_pair_that_reads_the_value() -> None:
    """Lanes are evaluated together, and the message still names the pair of the faulty lane."""
    attend = compile_attention(pattern("q >= 3 and k >= 5 and sum(10 // (q - 9) for j in 0 .. q + 70) >= 0"))
    with pytest.raises(EvaluationError, match="division by zero, at query row 9 and key 5"):
        attend.mask(16)


def test_small_numbers_are_constants() -> None:
    assert isinstance(aggregate("max", fold.var("i", 1), *_ends(), fold.truth(True), fold.var("i", 1)), Const)


def _ends() -> tuple[Index, Index]:
    return fold.const(0), fold.const(100_000)
