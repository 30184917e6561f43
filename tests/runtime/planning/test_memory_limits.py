"""Sizes that are refused before anything is computed; the message states the memory that they would need."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from attnc import Attention, compile_attention
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.pictures.draw import draw
from attnc.runtime.pictures.tile_map import make_tile_map
from command_calls import run

N = 100_000_000


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("causal", lambda x: x.mask(10**6), "1,000,000 queries × 1,000,000 keys would need 931 GiB"),
        ("causal", lambda x: x.mask(1, 1 << 33), "would need 8 GiB; the limit is 4 GiB"),
        ("moba", lambda x: x.mask(10**6), "would need 931 GiB"),
        ("causal", lambda x: x.picture(N), "100,000,000 tokens would need about 11.9 GiB"),
        ("full", lambda x: draw(x, 1, N), "100,000,000 tokens would need about 11.9 GiB"),
        ("causal", lambda x: make_tile_map(x, N, N), "draw at most 8,388,608 tokens"),
    ],
)
def test_refused_at_once(name: str, call: Callable[[Attention], object], message: str) -> None:
    attend = compile_attention(name)
    start = time.perf_counter()
    with pytest.raises(ArgumentError, match=message):
        call(attend)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("more", [[], ["--tiles"], ["--json"]])
def test_the_command_refuses_large_sizes(more: list[str]) -> None:
    done = run("show", "causal", "--len", str(N), *more)
    assert done.status == 2
    assert "a picture of 100,000,000 tokens would need about 11.9 GiB; the limit is 1 GiB" in done.out + done.err


def test_a_single_row_may_be_long() -> None:
    """The limit is on pairs, not on lengths."""
    assert compile_attention("causal").mask(2, 1_000_000).shape == (2, 1_000_000)
