"""The evaluator's results for recurrences, against numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from attnc.spec.errors import EvaluationError
from attnc.spec.load import load_program
from attnc.spec.meaning.bind import bind
from attnc.spec.meaning.evaluate import Evaluator
from attnc.spec.source import SourceFile

Q = [[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]]
K = [[1.0, 0.0], [2.0, 1.0], [0.0, -1.0]]
V = [[1.0, 10.0, 100.0], [2.0, 20.0, 200.0], [4.0, 40.0, 400.0]]
SUM = "state S: [dk, dv]\n    step S = S + outer(k, v)\n    read q @ S"


def rows(lines: str, *, states: Any = None, tokens: int = 3, **inputs: Any) -> list[Any]:
    """Return the outputs of three tokens for one head."""
    return whole(lines, states=states, tokens=tokens, **inputs)[0]


def whole(lines: str, *, states: Any = None, tokens: int = 3, **inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    source = SourceFile("r.attn", f"recurrence r\n    {lines}\n")
    bound = bind(load_program(source, lambda name, asker: None), {})
    evaluator = Evaluator(bound, queries=tokens, keys=tokens, dk=2, dv=3, inputs=inputs)
    tensors = ([[x[:tokens]]] for x in (Q, K, V))
    out, last = evaluator.recur(*tensors, scale=0.5, states=states)
    return [list(row) for row in out[0][0]], {name: x[0][0] for name, x in last.items()}


def test_a_sum() -> None:
    """The read is the sum of (q_t · k_i) v_i over i up to t."""
    weights = [[1.0], [0.5, 0.0], [3.0, 6.0, 0.0]]
    outputs, last = whole(SUM)
    for row, row_weights in zip(outputs, weights, strict=True):
        assert row == [sum(w * V[i][c] for i, w in enumerate(row_weights)) for c in range(3)]
    assert last["S"] == ((5.0, 50.0, 500.0), (-2.0, -20.0, -200.0))


def test_reading_before_and_between() -> None:
    before = "state S: [dk, dv]\n    read q @ S\n    step S = S + outer(k, v)"
    assert rows(before)[0] == [0.0, 0.0, 0.0]
    assert rows(before)[1] == [0.5, 5.0, 50.0]
    let = "state S: [dk, dv]\n    let old = q @ S\n    step S = S + outer(k, v)\n    read q @ S - old"
    assert rows(let) == [[1.0, 10.0, 100.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_axes_go_by_name() -> None:
    """A factor over dk scales rows, a factor over dv scales columns."""
    by_row = "state S: [dk, dv]\n    step S = k * S + outer(k, v)\n    read q @ S"
    _, last = whole(by_row, tokens=2)
    assert last["S"] == ((2.0 * 1.0 + 4.0, 60.0, 600.0), (2.0, 20.0, 200.0))
    by_column = "state S: [dk, dv]\n    step S = v * S + outer(k, v)\n    read S @ q"
    _, last = whole(by_column, tokens=2)
    assert last["S"][0] == (2.0 * 1.0 + 4.0, 20.0 * 10.0 + 40.0, 200.0 * 100.0 + 400.0)


def test_orders_resets_documents() -> None:
    backwards = rows(f"scan -t\n    {SUM}")
    assert backwards[2] == [0.0, 0.0, 0.0]  # k_2 · q_2 = 0
    assert backwards[1] == [0.5 * 0.0 + 1.0 * 4.0, 40.0, 400.0]
    fresh = rows(f"input fresh: bool[token]\n    reset fresh\n    {SUM}", fresh=[False, False, True])
    assert fresh[2] == [0.0, 0.0, 0.0]
    assert fresh[1] == rows(SUM)[1]
    places = f"input doc: int[token]\n    documents doc\n    {SUM}".replace("outer", "t * outer")
    assert rows(places, doc=[0, 1, 1])[:2] == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert rows(places, doc=[0, 1, 1])[2] == [0.0, 0.0, 0.0]
    assert rows(places, doc=[0, 0, 0])[2] == [6.0 * 2.0, 120.0, 1200.0]
    with pytest.raises(EvaluationError, match="the same value for two tokens"):
        rows(f"scan t // 2\n    {SUM}")


def test_repeated_steps_see_each_other() -> None:
    lines = "input b: real[token, n]\n    state S: [dv]\n    step S = b[j] * S + v for j in 0 .. n\n    read S"
    assert rows(lines, b=[[2.0, 3.0]] * 3)[0] == [3.0 * 1.0 + 1.0, 40.0, 400.0]
    assert rows(lines, b=[[2.0, 3.0]] * 3)[1][0] == 3.0 * (2.0 * 4.0 + 2.0) + 2.0


def test_starts_and_given_states() -> None:
    peak = "state m: [dk] = -inf\n    step m = logaddexp(m, k)\n    read exp(m)"
    assert rows(peak)[0] == pytest.approx([math.e, 1.0])
    assert rows(peak, states={"m": [[[0.0, 0.0]]]})[0] == pytest.approx([math.e + 1.0, 2.0])


def test_solving_and_matrices() -> None:
    read = "solve(A + diag(q * q) + eye(dk), k) @ (0.5 * outer(q, v))"
    lines = f"state A: [dk, dk]\n    step A = A + outer(k, k)\n    read {read}"
    (first, *_) = rows(lines, tokens=1)
    x = 1.0 / (1.0 + 1.0 + 1.0)
    assert first == pytest.approx([0.5 * x * 1.0, 5 * x, 50 * x])
    softmax = "state S: [dk, dv]\n    step S = S + outer(k, v)\n    read softmax(q) @ S"
    share = 1 / (1 + math.e)
    assert rows(softmax)[0] == pytest.approx([share, 10 * share, 100 * share])


def test_choices_totals_and_definitions() -> None:
    step = "let twice(x) = 2 * x\n    state S: [dv]\n    step S = twice(v) if t % 2 == 0 else S"
    lines = f"{step}\n    read sum(S * (i + 1) for i in 0 .. 2)"
    assert rows(lines) == [[6.0, 60.0, 600.0], [6.0, 60.0, 600.0], [24.0, 240.0, 2400.0]]
    with pytest.raises(EvaluationError):
        rows("state S: [dv]\n    step S = S + 1 // t * v\n    read S")
