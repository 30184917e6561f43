"""Costs of a recurrence that runs token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from attnc import compile_attention
from attnc.runtime.executors.recurrent.token_integers import MOST_KEPT, TokenIntegers

pytestmark = pytest.mark.usefixtures("one_thread")

ENTRIES = """recurrence entries
    state S: [dk, dv]
    let size = sqrt(max(sum(S[i, j] ** 4 for i in 0 .. dk, j in 0 .. dv), 1e-6))
    step S = S + outer(k, v) / size if t % 3 == 0 else S
    read q @ S
"""

NEAR = """recurrence near
    state S: [dk, dv]
    let near = sum((j + 1) * abs(q @ S @ v) for j in max(0, t - 3) .. t + 1 if j % 2 == t % 2)
    step S = 0.9 * S + outer(k, v) / (1 + near)
    read q @ S
"""


def largest_numbers(attend: Any, numbers: list[int], lengths: tuple[int, int]) -> list[int]:
    """Return the largest number that calls of each length append to `numbers`."""
    maxima = []
    for tokens in lengths:
        numbers.clear()
        q, k, v = (torch.randn(1, 1, tokens, 2, dtype=torch.float64) for _ in range(3))
        attend(q, k, v)
        maxima.append(max(numbers))
    return maxima


def test_indices_and_conditions_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices and conditions of all tokens were computed anew at each token."""
    integers, calls = TokenIntegers.of, list[int]()

    def counted(self: TokenIntegers, *arguments: Any) -> NDArray[np.int64]:
        calls.append(len(calls) + 1)
        return integers(self, *arguments)

    monkeypatch.setattr(TokenIntegers, "of", counted)
    counts = largest_numbers(compile_attention(ENTRIES, backend="reference"), calls, (3, 9))
    assert counts[0] == counts[1] > 0


def test_cached_values_of_variables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a variable that runs over all tokens, an array of all tokens was cached for each of its values."""
    in_order, cache_sizes = TokenIntegers.in_order, list[int]()

    def counted(self: TokenIntegers, *arguments: Any) -> NDArray[np.int64]:
        result = in_order(self, *arguments)
        cache_sizes.append(len(self._kept))
        return result

    monkeypatch.setattr(TokenIntegers, "in_order", counted)
    result = largest_numbers(compile_attention(NEAR, backend="reference"), cache_sizes, (150, 300))
    assert result[0] == result[1] <= 2 * MOST_KEPT
