"""Decisions whether a pattern is contained in a model's relation, checked against masks of several lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import UnsupportedError, compile_attention
from attnc.compiler.ir import Index
from attnc.runtime.bridges.amended import SINKS, amended
from attnc.runtime.bridges.model_masks import LayerMask
from attnc.runtime.bridges.within import outside

MASKS = [
    LayerMask(True),
    LayerMask(True, window=8),
    LayerMask(True, chunk=6),
    LayerMask(False),
    LayerMask(False, window=8),
]
PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("causal", {}),
    ("full", {}),
    ("sliding_window", {"window": 8}),
    ("sliding_window", {"window": 9}),
    ("sliding_window", {"window": 8, "sinks": 1}),
    ("dilated_window", {"window": 3, "dilation": 3}),
    ("strided", {"stride": 5, "local": 3}),
    ("blocked", {"block": 6}),
    ("neighborhood_1d", {"window": 7}),
    ("neighborhood_1d", {"window": 7, "causal": True}),
    ("sparse_transformer", {"stride": 4}),
    ("long_lora", {"groups": 2}),
]


def relation(layer_mask: LayerMask) -> Index:
    return layer_mask.attention.pattern.attend.visible


@pytest.mark.parametrize("layer_mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("name", "params"), PATTERNS, ids=[f"{n}-{'-'.join(map(str, p.values()))}" for n, p in PATTERNS]
)
def test_decisions_agree_with_masks(name: str, params: dict[str, Any], layer_mask: LayerMask) -> None:
    attend = compile_attention(name, **params)
    outcome = outside(attend, relation(layer_mask), 4, 2)
    lengths = range(8, 33, 8)  # the lengths that `neighborhood_1d` and `long_lora` allow
    beyond = {
        (n, head): bool((attend.mask(n, head=head, heads=4, kv_heads=2) & ~layer_mask.attention.mask(n)).any())
        for n in lengths
        for head in range(4)
    }
    assert (outcome is not None) == any(beyond.values())
    if outcome is not None:
        assert outcome.witness is not None
        assert outcome.is_sure
        pair, head = outcome.witness.pair, outcome.witness.head
        assert attend.mask(pair.length, head=head, heads=4, kv_heads=2)[pair.q, pair.k]
        assert not layer_mask.attention.mask(pair.length)[pair.q, pair.k]


def test_conditions_on_inputs_are_assumed_true() -> None:
    causal = relation(LayerMask(True))
    assert outside(compile_attention("document"), causal, 4, 4) is None
    assert outside(compile_attention("native_sparse"), causal, 4, 4) is None
    outcome = outside(compile_attention("prefix_lm"), causal, 4, 4)
    assert outcome is not None
    assert not outcome.is_sure


def test_undecided_containment() -> None:
    outcome = outside(compile_attention("gla"), relation(LayerMask(True)), 4, 4)
    assert outcome is not None
    assert outcome.witness is None
    outcome = outside(
        compile_attention("pattern p\n    over j in 0 .. 4\n    score 0\n    value v[j]\n"),
        relation(LayerMask(True)),
        4,
        4,
    )
    assert outcome is not None
    assert "not tokens" in outcome.why


def test_a_models_cap_and_sinks() -> None:
    """A score cap and sinks are added to a pattern that has clauses and to a pattern without any."""
    q, k, v = (torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    rows, keys = torch.arange(9)[:, None], torch.arange(9)[None]
    masks = {
        compile_attention("sliding_window", window=3): (rows - keys < 3) & (keys <= rows),
        compile_attention("full"): rows >= 0,
    }
    for attend, visible in masks.items():
        attention: Any = amended(attend, cap=1.5, sinks=True)
        out = attention(q, k, v, scale=0.7, **{SINKS: sinks})
        score = torch.tanh(q @ k.transpose(-1, -2) * 0.7 / 1.5) * 1.5
        score = score.masked_fill(~visible, -torch.inf)
        weights = torch.cat([score, sinks[:, None, None].expand(2, 4, 9, 1)], -1).softmax(-1)[..., :-1]
        expected = weights @ v
        torch.testing.assert_close(out, expected)
        outcome, wanted = (torch.autograd.grad(x.sum(), sinks)[0] for x in (out, expected))
        torch.testing.assert_close(outcome, wanted)
    with pytest.raises(UnsupportedError, match="caps its scores at 2 and has sinks"):
        amended(compile_attention("alibi"), cap=2, sinks=True)
