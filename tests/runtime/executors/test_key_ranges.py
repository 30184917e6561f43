"""Ranges and blocks of keys listed by the caller: a relation is a set, so overlapping and repeated entries count once.

`strict` does not check these forms; each test shows that duplicates are harmless (`docs/routing.md`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention

N = 20
START = torch.tensor([[0, 2, 0], [-5, 40, 18], [8, 8, 1]])
"""Ranges of each block of 8 queries: a repeated range, ranges past both ends, and overlapping ranges."""
STOP = torch.tensor([[4, 5, 4], [3, 88, 45], [20, 20, 10]])
BLOCKS = torch.tensor([[0, 1, 0], [-7, 9, 2], [1, 1, 1]])

INSIDE = "start[q // 8, i] <= k < stop[q // 8, i]"
RANGES = [
    f"any({INSIDE} for i in n)",
    "any(start[q // 8, i] <= k and k < stop[q // 8, i] for i in n)",
    "any(not (k < start[q // 8, i] or stop[q // 8, i] <= k) for i in n)",
    "not all(start[q // 8, i] > k or k >= stop[q // 8, i] for i in n)",
    f"sum((1 if {INSIDE} else 0) for i in n) > 0",
    f"count({INSIDE} for i in n) >= 1",
    " or ".join(INSIDE.replace("i]", f"{i}]") for i in range(3)),
]
LISTED = [
    "any(start[q // 8, i] * 8 <= k < start[q // 8, i] * 8 + 8 for i in n)",
    "any(start[q // 8, i] <= k / 8 < start[q // 8, i] + 1 for i in n)",
    "count(start[q // 8, i] == k // 8 for i in n) >= 1",
    "max((1 if start[q // 8, i] == k // 8 else 0) for i in n) == 1",
]


def visible_keys(start: Tensor, stop: Tensor) -> Tensor:
    """Return the mask of visible keys, (N, N)."""
    rows, keys = torch.arange(N) // 8, torch.arange(N)
    return ((start[rows][:, :, None] <= keys) & (keys < stop[rows][:, :, None])).any(1)


def check(attend: Any, mask: Tensor, decodes: bool = True, **inputs: Tensor) -> None:
    """Compare a call and a decode step with dense attention."""
    q, k, v = torch.randn(1, 2, N, 8), torch.randn(1, 1, N, 8), torch.randn(1, 1, N, 8)
    scores = torch.where(mask, q @ k.mT * 8**-0.5, -torch.inf)
    true = torch.nan_to_num(torch.softmax(scores, -1)) @ v
    torch.testing.assert_close(attend(q, k, v, **inputs), true)
    if decodes:
        torch.testing.assert_close(attend.decode(q[:, :, -1:], k, v, kv_len=N, **inputs), true[:, :, -1:])


def text(visible: str) -> str:
    ends = "    input stop: int[rows, n]\n" if "stop" in visible else ""
    return f"pattern p\n    input start: int[rows, n]\n{ends}    align end\n    visible {visible}\n"


@pytest.mark.parametrize("visible", RANGES)
def test_ranges_are_a_set(visible: str) -> None:
    check(compile_attention(text(visible), strict=True), visible_keys(START, STOP), start=START, stop=STOP)


@pytest.mark.parametrize("visible", LISTED)
def test_blocks_are_a_set(visible: str) -> None:
    check(compile_attention(text(visible), strict=True), visible_keys(BLOCKS * 8, BLOCKS * 8 + 8), start=BLOCKS)


@pytest.mark.parametrize("visible", [RANGES[0], LISTED[0], LISTED[2]])
def test_kernels_agree_on_the_set(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="kernels need Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    attend = compile_attention(text(visible), backend="triton")
    if "stop" in visible:
        check(attend, visible_keys(START, STOP), False, start=START, stop=STOP)
    else:
        check(attend, visible_keys(BLOCKS * 8, BLOCKS * 8 + 8), False, start=BLOCKS)


@pytest.mark.parametrize("row", range(3))
def test_overlapping_selected_spans_are_a_set(row: int) -> None:
    attend = compile_attention(
        "pattern p\n    input start: int[n]\n    input stop: int[n]\n    input worth: real[query, n]\n    align end\n"
        "    select chosen\n        over i in 0 .. n\n        covers start[i] <= k < stop[i]\n"
        "        score worth[q, i]\n        keep rank < 2\n    visible k in chosen and k <= q\n"
    )
    worth = torch.randn(N, 3)
    best = worth.topk(2, -1).indices
    start, stop, keys = START[row][best][:, :, None], STOP[row][best][:, :, None], torch.arange(N)
    mask = ((start <= keys) & (keys < stop)).any(1).tril()
    check(attend, mask, False, start=START[row], stop=STOP[row], worth=worth)
