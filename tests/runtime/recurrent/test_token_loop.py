"""Costs of a recurrence that runs token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from attnc import compile_attention
from attnc.runtime.recurrent.token_integers import MOST_KEPT, TokenIntegers

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


def largest(attend: Any, numbers: list[int], lengths: tuple[int, int]) -> list[int]:
    """Return the largest number that calls of each length append to `numbers`."""
    found = []
    for tokens in lengths:
        numbers.clear()
        q, k, v = (torch.randn(1, 1, tokens, 2, dtype=torch.float64) for _ in range(3))
        attend(q, k, v)
        found.append(max(numbers))
    return found


def test_indices_and_conditions_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token asked for those of all tokens anew."""
    integers, calls = TokenIntegers.of, list[int]()

    def counted(self: TokenIntegers, *arguments: Any) -> NDArray[np.int64]:
        calls.append(len(calls) + 1)
        return integers(self, *arguments)

    monkeypatch.setattr(TokenIntegers, "of", counted)
    found = largest(compile_attention(ENTRIES, backend="reference"), calls, (3, 9))
    assert found[0] == found[1] > 0


def test_values_of_variables_are_kept_for_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that runs over all tokens had an array of all tokens kept for each of its values."""
    in_order, kept = TokenIntegers.in_order, list[int]()

    def counted(self: TokenIntegers, *arguments: Any) -> NDArray[np.int64]:
        found = in_order(self, *arguments)
        kept.append(len(self._kept))
        return found

    monkeypatch.setattr(TokenIntegers, "in_order", counted)
    found = largest(compile_attention(NEAR, backend="reference"), kept, (150, 300))
    assert found[0] == found[1] <= 2 * MOST_KEPT
