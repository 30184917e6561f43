"""What a recurrence costs that runs token by token."""

from __future__ import annotations

import pytest
import torch

from attnc import compile_attention
from attnc.runtime.recurrent.token_values import TokenValues

pytestmark = pytest.mark.usefixtures("one_thread")

ENTRIES = """recurrence entries
    state S: [dk, dv]
    let size = sqrt(max(sum(S[i, j] ** 4 for i in 0 .. dk, j in 0 .. dv), 1e-6))
    step S = S + outer(k, v) / size if t % 3 == 0 else S
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
