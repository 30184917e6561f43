"""Costs of a recurrence that runs token by token."""

from __future__ import annotations

import pytest
import torch

from attnc import compile_attention
from attnc.runtime.recurrent.token_values import MOST_KEPT, TokenValues

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


def test_indices_and_conditions_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token asked for those of all tokens anew."""
    integers, calls = TokenValues.integers, list[int]()

    def counted(self: TokenValues, *arguments: object) -> object:
        calls.append(1)
        return integers(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TokenValues, "integers", counted)
    attend = compile_attention(ENTRIES, backend="reference")
    found = []
    for tokens in (3, 9):
        calls.clear()
        q, k, v = (torch.randn(1, 1, tokens, 2, dtype=torch.float64) for _ in range(3))
        attend(q, k, v)
        found.append(len(calls))
    assert found[0] == found[1] > 0


def test_values_of_variables_are_kept_for_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that runs over all tokens had an array of all tokens kept for each of its values."""
    most = []
    taken = TokenValues.integers_taken

    def counted(self: TokenValues, *arguments: object) -> object:
        found = taken(self, *arguments)  # type: ignore[arg-type]
        most.append(len(self._exact))
        return found

    monkeypatch.setattr(TokenValues, "integers_taken", counted)
    attend = compile_attention(NEAR, backend="reference")
    found = []
    for tokens in (150, 300):
        most.clear()
        q, k, v = (torch.randn(1, 1, tokens, 2, dtype=torch.float64) for _ in range(3))
        attend(q, k, v)
        found.append(max(most))
    assert found[0] == found[1] <= 2 * MOST_KEPT
