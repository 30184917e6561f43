"""Choices that look ahead: found where they are, with a witness that is one, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import compile_attention
from attnc.compiler.foresight import looks_ahead

AHEAD = {
    "the own block": ("over b = k // 32", "dot(q, mean(b.k))", "b.start <= q", "rank < 2"),
    "a later key": ("over b = k // 32", "dot(q, k[min(b.end + 32, keys - 1)])", "b.end <= q", "rank < 2"),
    "the last queries": (
        "over b = k // 32",
        "sum(dot(q[i], mean(b.k)) for i in keys - 4 .. keys)",
        "b.end <= q",
        "rank < 2",
    ),
    "a share of all": (
        "over b = k // 32",
        "exp(dot(q, mean(b.k))) / sum(exp(dot(q, mean(b.k))) for b)",
        "b.start <= q",
        "rank < 2",
    ),
}
BEHIND = {
    "blocks that are past": ("over b = k // 32", "dot(q, mean(b.k))", "b.end <= q", "rank < 2"),
    "what is there of the own block": (
        "over b = k // 32",
        "dot(q, sum(k[j] for j in b.start .. min(b.end, q + 1)))",
        "b.start <= q",
        "rank < 2",
    ),
    "keys": ("over k", "dot(q, k)", "k <= q", "rank < 9"),
    "a side that is not taken": (
        "over b = k // 32",
        "dot(q, mean(b.k)) if b.end <= q else 0",
        "b.start <= q",
        "rank < 2",
    ),
}


def text(over: str, score: str, candidates: str, keep: str, rest: str = " and k <= q") -> str:
    over = "" if over == "over k" else f"        {over}\n"
    return (
        f"pattern p\n    align end\n    select chosen\n{over}        score  {score}\n        from   {candidates}\n"
        f"        keep   {keep}\n    visible k in chosen{rest}\n"
    )


@pytest.mark.parametrize("name", AHEAD)
def test_what_looks_ahead_is_found(name: str) -> None:
    """Changing a token changes what queries before it choose."""
    attend = compile_attention(text(*AHEAD[name]))
    found = looks_ahead(attend.pattern)
    assert found is not None
    assert found.token > found.query
    assert any(_chooses_otherwise(attend, token, seed) for seed in range(10) for token in (127, 159, 191))


def _chooses_otherwise(attend: Any, token: int, seed: int) -> bool:
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn((1, 1, 192, 8), generator=draw) for _ in range(2))
    before = attend.chosen(q, k, k)["chosen"][0, :, :token]
    for x in (q, k):
        x[:, :, token] += 9 * torch.randn((8,), generator=draw)
    return not torch.equal(before, attend.chosen(q, k, k)["chosen"][0, :, :token])


@pytest.mark.parametrize("name", BEHIND)
def test_what_looks_back_is_left_alone(name: str) -> None:
    assert looks_ahead(compile_attention(text(*BEHIND[name])).pattern) is None


def test_a_pattern_that_is_not_causal_may_look_anywhere() -> None:
    assert looks_ahead(compile_attention(text(*AHEAD["the own block"], rest="")).pattern) is None
    assert looks_ahead(compile_attention("causal").pattern) is None


@pytest.mark.parametrize(("name", "ahead"), [("moba", False), ("native_sparse", False), ("minference_blocks", True)])
def test_the_library(name: str, ahead: bool) -> None:
    assert (looks_ahead(compile_attention(name).pattern) is not None) == ahead
