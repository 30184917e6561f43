"""Equality, hashes, print(model) and profiler rows of an Attention."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnc import ArgumentError, compile_attention


def test_equal_attentions_are_equal() -> None:
    attend = compile_attention("sliding_window", window=64)
    for equal_attention in (compile_attention("sliding_window", window=64), pickle.loads(pickle.dumps(attend))):
        assert attend == equal_attention
        assert hash(attend) == hash(equal_attention)
    text = "pattern p\n    visible k <= q\n"
    assert compile_attention(text) == compile_attention(text)
    different_attentions = [
        compile_attention("sliding_window", window=65),
        compile_attention("sliding_window", window=64, strict=True),
        compile_attention("sliding_window", window=64, backend="reference"),
        compile_attention("causal"),
        "sliding_window",
    ]
    assert all(attend != different_attention for different_attention in different_attentions)
    assert len({attend, compile_attention("sliding_window", window=64), *different_attentions}) == 6


def test_print_of_a_model_shows_its_patterns() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = compile_attention("sliding_window", window=64).module()
            self.biased = compile_attention("t5").module(heads=2)

    layer = Layer()
    assert "Attention('sliding_window', window=64, sinks=0)" in str(layer)
    assert "Attention('t5'" in str(layer)
    q = torch.randn(1, 2, 9, 8)
    assert torch.equal(layer.attend(q, q, q), compile_attention("sliding_window", window=64)(q, q, q))
    with pytest.raises(ArgumentError, match=r"has a dimension `head`: pass its size, `heads=…`"):
        compile_attention("t5").module()


def _compiled(q: Any, k: Any, v: Any) -> Any:
    return torch.compile(compile_attention("causal"), backend="eager", fullgraph=True)(q, k, v)


ROWS: dict[str, Callable[..., Any]] = {
    "attnc::causal": compile_attention("causal"),
    "attnc::alibi": compile_attention("alibi"),
    "attnc::strided": lambda q, k, v: compile_attention("strided", stride=4).reference(q, k, v),
    "attnc::causal.decode": lambda q, k, v: compile_attention("causal").decode(q[:, :, :1], k, v, kv_len=9),
    "attnc::causal.prefill": lambda q, k, v: compile_attention("causal").prefill(q, k, v, kv_len=9),
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_profiler_carry_the_name(row: str) -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    ROWS[row](q, k, v)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ROWS[row](q, k, v)
    assert row in {event.key for event in profile.key_averages()}


def test_rows_of_a_compiled_graph_carry_the_name() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _compiled(q, k, v).sum().backward()
    torch._dynamo.reset()
    assert {"attnc::causal", "attnc::causal.backward"} <= {event.key for event in profile.key_averages()}


BACKWARD: dict[str, dict[str, Any]] = {
    "causal": {},  # tiles, scores, weights, a selection, documents, branches, recurrences
    "alibi": {},
    "affine_scaled": {"alpha": torch.rand(1, 2, 40), "beta": torch.rand(1, 2, 40)},
    "moba": {},
    "document": {"doc": torch.arange(40)[None] // 9},
    "combiner_log_sparse": {},
    "retention": {},
    "gla": {"g": -torch.rand(1, 40, 2, 8)},
    "delta_net": {"beta": torch.rand(1, 40, 2)},
}


@pytest.mark.parametrize("name", BACKWARD)
def test_rows_of_the_backward_carry_the_name_wherever_the_profiler_began(name: str) -> None:
    attend = compile_attention(name)
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    result = attend(q, k, v, **BACKWARD[name]).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result.backward()
    rows = {event.key for event in profile.key_averages() if event.key.startswith("attnc::")}
    assert rows == {f"attnc::{name}.backward"}


def test_a_backward_under_autocast_has_one_row() -> None:
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    result = compile_attention("causal")(q, k, v).sum()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        result.backward()  # type: ignore[no-untyped-call]
    rows = [event.count for event in profile.key_averages() if event.key == "attnc::causal.backward"]
    assert rows == [1]
