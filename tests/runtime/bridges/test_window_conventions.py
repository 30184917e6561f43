"""Sliding windows of other libraries, each by that library's own definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import ArgumentError, ArgumentTypeError, bridges, compile_attention


def flash_mask(n_q: int, n_k: int, left: int, right: int, causal: bool) -> Tensor:
    """FlashAttention's README: query i sees the keys from i + Nk - Nq - left to i + Nk - Nq + right, both included."""
    mask = torch.zeros(n_q, n_k, dtype=torch.bool)
    for i in range(n_q):
        place = i + n_k - n_q
        for j in range(n_k):
            before = left == -1 or j >= place - left
            after = j <= place if causal else (right == -1 or j <= place + right)
            mask[i, j] = before and after
    return mask


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [(-1, -1), (0, 0), (3, 0), (-1, 0), (4, 2), (0, 5), (-1, 2), (3, -1), (50, 50)])
def test_flash_windows(size: tuple[int, int], causal: bool) -> None:
    attend = bridges.from_flash_window(size, causal=causal)
    for n_q, n_k in ((13, 13), (5, 13), (1, 13)):
        assert torch.equal(attend.mask(n_q, n_k), flash_mask(n_q, n_k, *size, causal)), (n_q, n_k)


def test_a_flash_window_as_a_library_pattern() -> None:
    """The window has left + 1 keys: we count the query's own key, and FlashAttention does not."""
    window = bridges.from_flash_window((3, 0))
    assert (window.name, window.parameters) == ("sliding_window", {"window": 4, "sinks": 0})
    assert bridges.from_flash_window((3, 7), causal=True).parameters == window.parameters
    assert bridges.from_flash_window((-1, -1), causal=True).name == "causal"
    assert bridges.from_flash_window((-1, -1)).name == "full"


def test_more_queries_than_keys() -> None:
    """The first queries stand before key 0."""
    for size in ((3, 0), (3, 2), (-1, 0)):
        assert torch.equal(bridges.from_flash_window(size).mask(9, 5), flash_mask(9, 5, *size, False)), size


@pytest.mark.parametrize("window", [1, 2, 7, 40])
@pytest.mark.parametrize("offset", [0, 6])
def test_transformers_windows(window: int, offset: int) -> None:
    """The oracle is built from Transformers' own mask functions; `offset` counts the keys before the first query."""
    masks = pytest.importorskip("transformers.masking_utils", reason="transformers is not installed")
    overlay = masks.sliding_window_causal_mask_function(window)
    assert torch.equal(
        bridges.from_transformers_window(window).mask(19, 19 + offset), _mask_of_overlay(overlay, 19, offset)
    )
    mask_function = masks.sliding_window_bidirectional_mask_function(window)
    ours = bridges.from_transformers_window(window, bidirectional=True)
    assert torch.equal(ours.mask(19, 19 + offset), _mask_of_overlay(mask_function, 19, offset))


def _mask_of_overlay(overlay: Any, n_q: int, offset: int) -> Tensor:
    zero = torch.tensor(0)
    rows = [
        [bool(overlay(zero, zero, torch.tensor(i + offset), torch.tensor(j))) for j in range(n_q + offset)]
        for i in range(n_q)
    ]
    return torch.tensor(rows)


def test_transformers_without_a_window() -> None:
    assert bridges.from_transformers_window(None).name == "causal"
    assert bridges.from_transformers_window(None, bidirectional=True).name == "full"


@pytest.mark.parametrize("window", [1, 5, 30])
def test_the_table_of_window_conventions(window: int) -> None:
    """The table in docs/bridges.md: one relation in three conventions, and a convention with one key more."""
    ours = compile_attention("sliding_window", window=window).mask(25)
    assert torch.equal(bridges.from_transformers_window(window).mask(25), ours)
    assert torch.equal(bridges.from_flash_window((window - 1, 0)).mask(25), ours)
    assert torch.equal(bridges.from_flash_window((window - 1, window - 1), causal=True).mask(25), ours)
    longer = bridges.from_flash_window((window, 0)).mask(25)
    assert torch.equal(longer, compile_attention("sliding_window", window=window + 1).mask(25))
    assert torch.equal(longer, ours) == (window >= 25)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        ((1, 2, 3), ArgumentTypeError, "it must be two numbers"),
        (4, ArgumentTypeError, "it must be two numbers"),
        ((1.0, 2), ArgumentTypeError, "it must be two whole numbers"),
        ((-2, 0), ArgumentError, "at least 0, or -1 for no limit"),
    ],
)
def test_flash_errors(size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bridges.from_flash_window(size)


def test_other_errors() -> None:
    with pytest.raises(ArgumentTypeError, match="causal is 1"):
        bridges.from_flash_window((1, 1), causal=1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="sliding_window is 0: it must be at least 1"):
        bridges.from_transformers_window(0)
    with pytest.raises(ArgumentTypeError, match="sliding_window is '4'"):
        bridges.from_transformers_window("4")  # type: ignore[arg-type]
