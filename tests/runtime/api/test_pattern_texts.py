"""The text of a pattern, and the planner and plans that patterns with equal texts share."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnc import ArgumentError, SpecError, compile_attention
from attnc.runtime.call.tensor_checks import TensorSizes
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.planning import planners
from attnc.runtime.planning.planners import planner_of
from attnc.runtime.process.recent import Recent
from attnc.runtime.texts import identity
from attnc.runtime.texts.identity import How
from operator_calls import (
    ATTEND,
    DOC,
    draw,
    text_of,
    window,
)

EXACT = """\
pattern exact(ratio: real = 0.2, on: bool = true, table: int[2, 2] = [[1, 2], [3, 4]])
    visible q * ratio <= k + table[0][1] and on
"""


@pytest.mark.parametrize("params", [{}, {"ratio": 0.1, "on": False, "table": [[0, -1], [2, 3]]}])
def test_a_pattern_and_its_text_are_the_same(params: dict[str, Any]) -> None:
    attend = compile_attention(EXACT, strict=True, **params)
    bound, how, form = identity.read(text_of(attend))
    assert form == "whole"
    assert (bound.values, how) == (attend.bound.values, How(strict=True))
    assert identity.write(bound, {}, how) == text_of(attend)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda data: "no json", ArgumentError),
        (lambda data: "[" * 100_000, ArgumentError),
        (lambda data: json.dumps({**data, "attnc": 0}), ArgumentError),
        (lambda data: json.dumps({**data, "source": ["name"]}), ArgumentError),
        (lambda data: json.dumps({**data, "values": {"ratio": "1e999999999"}}), ArgumentError),
        (lambda data: json.dumps({**data, "values": {"ratio": None}}), ArgumentError),
        (lambda data: json.dumps({**data, "source": ["a", "import os\n"]}), SpecError),
        (lambda data: json.dumps({**data, "values": {"other": 1}}), SpecError),
    ],
)
def test_invalid_texts(change: Callable[[dict[str, Any]], str], error: type[Exception]) -> None:
    text = change(json.loads(text_of(compile_attention(EXACT))))
    with pytest.raises(error):
        ATTEND(*draw(), [], text, None)


def test_the_text_of_a_live_attention_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = window(), window()
    text = text_of(first)
    assert text_of(second) == text
    monkeypatch.setattr(identity, "read", None)
    del first
    gc.collect()
    assert planner_of(text) is second._core.planner


def test_texts_of_dead_attentions_are_cached_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planners, "_read", Recent(2))
    texts = [text_of(compile_attention("sliding_window", window=900 + i)) for i in range(3)]
    gc.collect()
    assert not set(texts) & set(planners._live_planners)
    planner_ids = [id(planner_of(text)) for text in texts]
    gc.collect()
    assert set(texts) & set(planners._live_planners) == set(texts[1:])
    assert [id(planner_of(text)) for text in texts[1:]] == planner_ids[1:]


def test_equal_patterns_share_their_plans() -> None:
    first, second = window(), window()
    assert first.plan(64, heads=4) is second.plan(64, heads=4)
    assert compile_attention("sliding_window", window=5, sinks=1, strict=True)._core.planner is not first._core.planner


def test_plans_are_found_by_shape_dtype_and_data() -> None:
    attend = compile_attention("document")
    planner, (q, k, v) = attend._core.planner, draw()
    plan = cpu_plans(planner).plan_of(q, k, v, [DOC])
    assert cpu_plans(planner).plan_of(q * 2, k, v, [DOC.clone()]) is plan
    assert cpu_plans(planner).plan(TensorSizes(17, 17, 2, 4, 4, 8, 8, "float32"), {"doc": DOC}) is plan
    for call in ((q.bfloat16(), k.bfloat16(), v.bfloat16(), DOC), (q[:1], k[:1], v[:1], DOC[:1]), (q, k, v, DOC // 2)):
        assert cpu_plans(planner).plan_of(*call[:3], [call[3]]) is not plan
    with pytest.raises(ArgumentError, match="1 inputs, got 0"):
        cpu_plans(planner).plan_of(q, k, v, [])


def test_inputs_may_be_tensors_lists_or_arrays() -> None:
    attend, tensors = compile_attention("document"), draw()
    expected = attend(*tensors, doc=DOC)
    for doc in (DOC.tolist(), DOC.numpy(), DOC.numpy().astype(">i2"), DOC.int()):
        assert torch.equal(attend(*tensors, doc=doc), expected)
