"""Selections that read the future of their query: reported with a true witness, and causal ones never reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import compile_attention
from attnc.compiler.warnings.foresight import looks_ahead

AHEAD = {
    "the query's own block": ("over b = k // 32", "dot(q, mean(b.k))", "b.start <= q", "rank < 2"),
    "a later key": ("over b = k // 32", "dot(q, k[min(b.end + 32, keys - 1)])", "b.end <= q", "rank < 2"),
    "the last queries": (
        "over b = k // 32",
        "sum(dot(q[i], mean(b.k)) for i in keys - 4 .. keys)",
        "b.end <= q",
        "rank < 2",
    ),
    "a share of all candidates": (
        "over b = k // 32",
        "exp(dot(q, mean(b.k))) / sum(exp(dot(q, mean(b.k))) for b)",
        "b.start <= q",
        "rank < 2",
    ),
}
BEHIND = {
    "past blocks": ("over b = k // 32", "dot(q, mean(b.k))", "b.end <= q", "rank < 2"),
    "the past part of the query's own block": (
        "over b = k // 32",
        "dot(q, sum(k[j] for j in b.start .. min(b.end, q + 1)))",
        "b.start <= q",
        "rank < 2",
    ),
    "keys": ("over k", "dot(q, k)", "k <= q", "rank < 9"),
    "an unselected case": (
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
def test_selections_that_read_later_tokens_are_reported(name: str) -> None:
    """Changing a token changes the selections of earlier queries."""
    attend = compile_attention(text(*AHEAD[name]))
    witness = looks_ahead(attend.pattern)
    assert witness is not None
    assert witness.token > witness.query
    assert any(_selection_changes(attend, token, seed) for seed in range(10) for token in (127, 159, 191))


def _selection_changes(attend: Any, token: int, seed: int) -> bool:
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn((1, 1, 192, 8), generator=draw) for _ in range(2))
    before = attend.chosen(q, k, k)["chosen"][0, :, :token]
    for x in (q, k):
        x[:, :, token] += 9 * torch.randn((8,), generator=draw)
    return not torch.equal(before, attend.chosen(q, k, k)["chosen"][0, :, :token])


@pytest.mark.parametrize("name", BEHIND)
def test_selections_that_read_earlier_tokens_are_not_reported(name: str) -> None:
    assert looks_ahead(compile_attention(text(*BEHIND[name])).pattern) is None


def test_patterns_that_are_not_causal_may_read_any_token() -> None:
    assert looks_ahead(compile_attention(text(*AHEAD["the query's own block"], rest="")).pattern) is None
    assert looks_ahead(compile_attention("causal").pattern) is None


@pytest.mark.parametrize(("name", "ahead"), [("moba", False), ("native_sparse", False), ("minference_blocks", True)])
def test_the_library(name: str, ahead: bool) -> None:
    assert (looks_ahead(compile_attention(name).pattern) is not None) == ahead
