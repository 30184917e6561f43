"""Kernels for scores that sum several products, such as multi-head latent attention; vectors are concatenated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnc import compile_attention
from kernel_calls import check, operands, stages

STAGES = {"forward", "delta", "dq", "dkdv"}
PARTS = "dot(part(q, 0, 2), part(k, 1, 2))"
SEVERAL = "there are no kernels for several products of vectors that are combined by more than a sum"


def pattern(score: str, inputs: str = "") -> str:
    return f"pattern several\n    align end\n{inputs}    visible 0 <= q - k < 40\n    score {score}\n"


@pytest.mark.parametrize(
    "score",
    [
        f"scale * ({PARTS} + dot(normalised(q), normalised(k)))",
        f"8 * tanh({PARTS} + dot(normalised(q), normalised(k)))",
        f"scale * dot(q, k) - 2 * {PARTS} + sin(q - k)",
        f"dot(q, k) / 4 + {PARTS} / 3 + scale * dot(normalised(q), normalised(k))",
    ],
)
def test_sums(score: str) -> None:
    attention = compile_attention(pattern(score), backend="triton", strict=True)
    assert stages(check(attention, operands(70, 90, heads=(2, 1)))) >= STAGES
    check(attention, operands(40, heads=(2, 1)), scale=0.0)


def test_decoupled_positions() -> None:
    """Positional keys that all heads share beside each head's content keys (DeepSeek-V2, arXiv 2405.04434, eq. 17)."""
    inputs = "    input qr: real[batch, head, query, rope]\n    input kr: real[batch, key, rope]\n"
    attention = compile_attention(pattern("scale * (dot(q, k) + dot(qr[q], kr[k]))", inputs), backend="triton")
    torch.manual_seed(4)
    position_inputs: dict[str, Any] = {"qr": torch.randn(2, 4, 50, 8), "kr": torch.randn(2, 60, 8)}
    assert stages(check(attention, operands(50, 60, heads=(4, 2), batch=2), position_inputs)) >= STAGES


@pytest.mark.parametrize(
    "score",
    [
        f"scale * dot(q, k) + {PARTS} ** 2",
        f"scale * dot(q, k) + 2 * scale * {PARTS}",
        f"scale * dot(q, k) * {PARTS}",
        f"(dot(q, k) if q - k < 9 else {PARTS})",
    ],
)
def test_other_forms_run_as_tiles_in_torch(score: str) -> None:
    attention = compile_attention(pattern(score), backend="triton")
    assert attention.plan(60, heads=2, device="cuda").fallback == SEVERAL
    assert not stages(check(attention, operands(30, heads=(2, 1))))
