"""Tokens before a border of a recurrence reach no token behind the border, in kernels."""

from __future__ import annotations

import math
from typing import Any

import torch

from attnc import compile_attention


def test_nothing_crosses_a_border_by_kernels() -> None:
    """It gave NaN: a chunk multiplies what another document holds by 0."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    gate, cut = -torch.rand(1, 20, 1), torch.tensor([0, 9, 20])
    v[:, :, 4] = math.nan
    attend = compile_attention("mamba2_ssd", backend="triton")
    inputs: dict[str, Any] = {"g": gate, "dt": torch.ones(1, 20, 1), "D": torch.ones(1)}
    out = attend(q, k, v, cu_seqlens=cut, **inputs)[:, :, 9:]
    own: dict[str, Any] = {name: x[:, 9:] if name != "D" else x for name, x in inputs.items()}
    alone = compile_attention("mamba2_ssd", backend="reference")(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:], **own)
    assert torch.allclose(out, alone, atol=1e-5)
