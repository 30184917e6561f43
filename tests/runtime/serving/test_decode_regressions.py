"""Regression tests: decode steps that were wrong, as `make hunt` found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import compile_attention


@pytest.mark.parametrize("weights", ["sigmoid(score)", "x[q] * softmax(score)", "softmax(score)"])
@pytest.mark.parametrize(
    "bias", ["0.75 ** abs(q - k)", "(0.5 if k <= q else -0.25)", "tanh((q + 1) * (k % 3))", "keys * (k - q) / 64"]
)
def test_scores_of_positions_beside_equal_ids(bias: str, weights: str) -> None:
    """`make hunt`, part cpu, case 40012: positions were counted within the run of equal ids."""
    gate = "    input x: unit[batch, head, query]\n" if "x[q]" in weights else ""
    text = (
        f"pattern p\n    input id: int[batch, token]\n{gate}    align end\n    visible id[q] == id[k]\n"
        f"    score scale * dot(q, k) + {bias}\n    weights {weights}\n"
    )
    attend: Any = compile_attention(text)
    q, k, v = torch.randn(2, 2, 12, 4), torch.randn(2, 1, 12, 4), torch.randn(2, 1, 12, 4)
    ids, x = torch.tensor([[0] * 5 + [1] * 7, [0] * 11 + [1]]), torch.rand(2, 2, 12)
    expected = attend(q, k, v, id=ids, **({"x": x} if gate else {}))
    for last in (1, 3):
        step_inputs = {"x": x[:, :, -last:]} if gate else {}
        out = attend.decode(q[:, :, -last:], k, v, kv_len=12, id=ids, **step_inputs)
        torch.testing.assert_close(out, expected[:, :, -last:])
