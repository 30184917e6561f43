"""`attnc receptive` for states, against the tokens on which the reference's results depend, and its printed text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attnc import Attention, UnsupportedError, compile_attention
from attnc.compiler.receptive.held import Held
from attnc.runtime.call.example_inputs import example_inputs
from attnc.runtime.cli import main
from attnc.runtime.patterns.layers import inputs_of_layer, layer_of
from command_calls import run_json
from receptive_fields import Mask, check_reach

N = 12
WINDOW_AND_STATE = """pattern w
    branch near
        visible 0 <= q - k < 3
    branch far
        {}state S: [dk, dv]
        step S = 0.9 * S + outer(k, v)
        read q @ S
    combine near + far
"""
RESETS = WINDOW_AND_STATE.format("reset t % 4 == 1\n        ")
BY_INPUT = RESETS.replace("pattern w\n", "pattern w\n    input new: bool[batch, token]\n").replace("t % 4 == 1", "new")
BACKWARD = WINDOW_AND_STATE.format("scan - t\n        ")
BACKWARD_RESETS = WINDOW_AND_STATE.format("scan - t\n        reset t % 4 == 1\n        ")
PACKED = WINDOW_AND_STATE.format("").replace(
    "pattern w\n", "pattern w\n    align end\n    input doc: int[batch, token]\n    documents doc\n"
)
PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "a window and a state": (WINDOW_AND_STATE.format(""), {}),
    "resets": (RESETS, {}),
    "resets that an input says": (BY_INPUT, {}),
    "a scan from the end": (BACKWARD, {}),
    "a scan from the end with resets": (BACKWARD_RESETS, {}),
    "documents": (PACKED, {}),
    "hybrid_window_linear": ("hybrid_window_linear", {"window": 3}),
    "both ways": ("mamba_mixer", {}),
    "levels": ("log_linear", {"levels": 4}),
    "scans that differ by head": ("mhs_vm", {"height": 3, "width": 4}),
    "a recurrence": ("gla", {}),
}


def dependences(attention: Attention, heads: int, inputs: dict[str, Any]) -> Mask:
    """Return the tokens whose values the reference's results depend on, in one of the heads."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((1, heads, N, 4), generator=draw, dtype=torch.float64) for _ in range(3))
    v.requires_grad_()
    out = attention.reference(q, k, v, **inputs)
    depends = np.zeros((N, N), dtype=np.bool_)
    for row in range(N):
        (grad,) = torch.autograd.grad(out[0, :, row].sum(), v, retain_graph=True)
        depends[row] = (grad[0].abs().amax((0, -1)) > 0).numpy()
    return depends


@pytest.mark.parametrize("name", PATTERNS)
def test_against_dependences_of_the_reference(name: str) -> None:
    spec, params = PATTERNS[name]
    attention = compile_attention(spec, **params)
    heads = 6 if name == "scans that differ by head" else 1
    sizes = {"dk": 4, "dv": 4}
    examples = example_inputs(attention.bound, N, N, {}, heads=heads, sizes=sizes)
    inputs = {name: example.tensor for name, example in examples.items()}
    mask = dependences(attention, heads, inputs)
    read = {name: x for name, x in inputs.items() if name in inputs_of_layer(attention)}
    layer = layer_of(attention, N, heads, read)
    tokens = np.arange(N)
    assert (layer.shows(tokens, tokens) | np.eye(N, dtype=np.bool_) == mask | np.eye(N, dtype=np.bool_)).all()
    for query in (0, N // 2, N - 1):
        check_reach([layer], [mask], [0], query)


def test_a_state_sees_the_whole_past_from_layer_1_on(capsys: pytest.CaptureFixture[str]) -> None:
    status, values = run_json(capsys, "receptive", "hybrid_window_linear", "--layers", "3")
    assert (status, values["complete_from"], values["should_see"]) == (0, 1, "k <= q")
    assert [layer["tokens"] for layer in values["layers"]] == [1, 16384, 16384, 16384]
    assert main(["receptive", "hybrid_window_linear", "--len", "64", "--path", "0"]) == 0
    out = capsys.readouterr().out
    assert "result    it sees everything that it should from layer 1 on\n" in out
    assert "path      0: reaches the query after 1 layer, for example by 0 → 63\n" in out
    assert "note      hybrid_window_linear: far is a state: a token depends on all tokens before it, as far" in out


def test_the_reach_of_a_state_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receptive", BACKWARD_RESETS, "--len", "12"]) == 0
    out = capsys.readouterr().out
    assert "before it since the last reset, in the order of its scan, as far as the state holds them\n" in out
    assert main(["receptive", PACKED, "--len", "12"]) == 0
    out = capsys.readouterr().out
    assert "all tokens before it of its document, as far as the state holds them\n" in out
    assert "result    it never sees everything that it should: 4 of 12 tokens from layer 1 on\n" in out


def test_states_take_turns_with_windows(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sliding_window", "-p", "window=4", "--times", "2", "--then", "gla", "--len", "64", "--layers", "3"]
    _, values = run_json(capsys, "receptive", *arguments)
    assert [layer["tokens"] for layer in values["layers"]] == [1, 4, 7, 64]


def test_unsupported_states(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedError, match="keys that are not tokens"):
        layer_of(compile_attention("spatial_mamba", height=3, width=4), N, 1, {})
    tied = WINDOW_AND_STATE.format("scan t // 2\n        ")
    assert main(["receptive", tied, "--len", "8"]) == 2
    assert "`scan` gives two tokens the same place" in capsys.readouterr().err


def test_sets_of_held_tokens() -> None:
    draw = np.random.default_rng(0)
    for n in (1, 2, 17):
        held = Held.of(draw.permutation(n), draw.random(n) < 0.3)
        every = np.arange(n)
        shown = held.shows(every, every)
        assert shown.diagonal().all()
        assert held.looks_back == (not np.triu(shown, 1).any())
        rows = np.flatnonzero(draw.random(n) < 0.5)
        seen_tokens = draw.random(n) < 0.3
        wanted = shown[rows].any(0)
        fresh = held.look(rows, before := seen_tokens.copy())
        assert (np.flatnonzero(wanted & ~seen_tokens) == fresh).all()
        assert (before == seen_tokens | wanted).all()
