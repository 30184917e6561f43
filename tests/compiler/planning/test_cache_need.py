"""The tokens that a cache must hold: enough for every length, and none to spare."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.counted_isl import is_available
from attnc.compiler.lowering.specialise import alone
from attnc.compiler.planning.cache_need import CacheNeed, cache_need, needed_by_all
from plan_calls import from_library, lowered

HEADS = 2


def missing(pattern: Any, need: CacheNeed) -> bool:
    """Return whether a query of up to 150 tokens sees a key that the cache would not hold."""
    for n in (1, 2, 40, 150):
        for head in range(HEADS):
            mask = exact_evaluation.mask(alone(pattern.attend.visible, n, head, HEADS), (0, n), (0, n))
            q, k = np.nonzero(mask)
            if ((k >= need.first) & (q - k >= need.last)).any():
                return True
    return False


KNOWN = [
    ("sliding_window", {"window": 40}, CacheNeed(0, 40)),
    ("sliding_window", {"window": 40, "sinks": 4}, CacheNeed(4, 40)),
    ("streaming", {"sinks": 3, "window": 30}, CacheNeed(3, 30)),
    ("dilated_window", {"window": 8, "dilation": 3}, CacheNeed(0, 22)),
    ("softcap", {"cap": 2, "window": 9}, CacheNeed(0, 9)),
]


@pytest.mark.parametrize(("name", "params", "need"), KNOWN)
def test_windows(name: str, params: dict[str, Any], need: CacheNeed) -> None:
    pattern = from_library(name, **params)
    assert cache_need(pattern, HEADS, 1) == need
    assert not missing(pattern, need)
    assert missing(pattern, CacheNeed(need.first, need.last - 1))
    if need.first:
        assert missing(pattern, CacheNeed(need.first - 1, need.last))


@pytest.mark.skipif(not is_available(), reason="islpy is not installed")
def test_blocks_are_proved_by_presburger_arithmetic() -> None:
    pattern = from_library("blocked", block=24)
    assert cache_need(pattern, HEADS, 1) == CacheNeed(0, 24)
    assert not missing(pattern, CacheNeed(0, 24))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("causal", {}),
        ("full", {}),
        ("strided", {"stride": 16, "local": 16}),
        ("power", {}),
        ("document", {}),
        ("prefix_lm", {}),
        ("neighborhood_2d", {"height": 8, "width": 8}),
        ("halo", {"height": 8, "width": 8}),
        ("sparse_transformer", {"stride": 16}),
    ],
)
def test_patterns_that_need_all_tokens(name: str, params: dict[str, Any]) -> None:
    assert cache_need(from_library(name, **params), HEADS, 1) is None


def test_the_widest_head_decides_the_need() -> None:
    pattern = lowered("pattern p(window: int[head])\n    visible 0 <= q - k < window\n", window=[3, 17])
    assert cache_need(pattern, 2, 1) == CacheNeed(0, 17)


def test_a_pattern_without_visible_keys_needs_no_tokens() -> None:
    assert cache_need(lowered("pattern p\n    visible k < 0\n"), 1, 1) == CacheNeed(0, 0)


def test_joined_needs_and_their_text() -> None:
    assert needed_by_all([CacheNeed(4, 9), CacheNeed(0, 20)]) == CacheNeed(4, 20)
    assert needed_by_all([CacheNeed(4, 9), None]) is None
    assert str(CacheNeed(4, 9)) == "the first 4 and the last 9 tokens"
    assert str(CacheNeed(0, 1)) == "the last 1 token"
