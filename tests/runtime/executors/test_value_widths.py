"""The width of an attention's output where no row sees a key."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import compile_attention
from attnc.runtime.api.compiled import Backend

VALUES = {"k - q": (8,), "dot(k, q) * v": (5,), "dot(k, q)": (), "table[0] * dot(q, k)": (3,)}


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", VALUES)
def test_the_width_of_a_value_that_no_row_has(value: str, backend: Backend, batch: int) -> None:
    """Fails if a value is assumed to be as wide as v."""
    inputs: dict[str, Any] = {"table": torch.randn(4, 3)} if "table" in value else {}
    line = "    input table: real[rows, wide]" if inputs else ""
    text = f"pattern unseen\n{line}\n    visible k < 0\n    value {value}\n"
    q, k, v = (torch.randn(batch, 2, 6, width, requires_grad=True) for width in (8, 8, 5))
    out, lse = compile_attention(text, backend=backend)(q, k, v, return_lse=True, **inputs)
    assert out.shape == (batch, 2, 6, *VALUES[value])
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
