"""NaN and infinities of a key reach every row that sees the key, and no other row or key, forward and backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention

TEXTS = {
    "causal": "pattern p\n    align end\n    visible k <= q\n",
    "window": "pattern p\n    align end\n    visible 0 <= q - k < 5 and k % 7 != 3\n",
    "biased": "pattern p\n    align end\n    visible k <= q\n    score scale * dot(q, k) + 0.5 ** (q - k)\n",
    "capped": "pattern p\n    align end\n    visible k <= q\n    score 2 * tanh(scale * dot(q, k))\n",
    "compared": "pattern p\n    input doc: int[token]\n    align end\n    visible doc[q] == doc[k] and k <= q\n",
}
N = 41
BORDER = 17
"""First token of the second document."""


def _tensors(heads: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, N, 8, generator=generator) for h in (heads[0], heads[1], heads[1]))
    return q, k, v


def _grads(attend: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, return_lse=True, **inputs)
    weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).cos()
    total = (out * weights)[:, :, rows].sum() + lse[:, :, rows].sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("kind", TEXTS)
def test_packed_sequences_are_independent(kind: str, which: str, value: float) -> None:
    attend = compile_attention(TEXTS[kind])
    q, k, v = _tensors()
    inputs: dict[str, Any] = (
        {"doc": (torch.arange(N) >= BORDER).long()}
        if kind == "compared"
        else {"cu_seqlens": torch.tensor([0, BORDER, N])}
    )
    second = torch.arange(N) >= BORDER
    exact = _grads(attend, q, k, v, second, **inputs)
    spoiled = {"k": k.clone(), "v": v.clone()}
    spoiled[which][:, :, 4] = value
    result = _grads(attend, q, spoiled["k"], spoiled["v"], second, **inputs)
    for ours, wanted in zip(result, exact, strict=True):
        assert torch.equal(ours[:, :, second], wanted[:, :, second])


@pytest.mark.parametrize("kind", ["causal", "window", "biased", "capped"])
def test_only_rows_that_see_a_nan_key_become_nan(kind: str) -> None:
    attend = compile_attention(TEXTS[kind])
    q, k, v = _tensors()
    sees = attend.mask(N)[:, 9]
    exact = _grads(attend, q, k, v, ~sees)
    v[:, :, 9] = math.nan
    result = _grads(attend, q, k, v, ~sees)
    assert result[0][:, :, sees].isnan().all()
    for ours, wanted in zip(result, exact, strict=True):
        if ours is not result[0] and ours is not result[1]:
            unseen = ~attend.mask(N)[sees].any(0) if ours is not result[2] else ~sees
            assert torch.equal(ours[:, :, unseen], wanted[:, :, unseen])
        else:
            assert torch.equal(ours[:, :, ~sees], wanted[:, :, ~sees])


def test_a_small_call_without_gradients() -> None:
    attend = compile_attention("causal")
    q, k, v = _tensors((2, 2))
    with torch.no_grad():
        wanted = attend(q, k, v)
        v[:, :, 30] = math.nan
        for _ in range(2):  # the second call takes the direct path
            result = attend(q, k, v)
            assert torch.equal(result[:, :, :30], wanted[:, :, :30])
            assert result[:, :, 30:].isnan().all()


@pytest.mark.parametrize("queries", [1, 2])
def test_decode_shows_a_visible_key_whose_bias_is_far_below(queries: int) -> None:
    """By its bias alone key 0 had weight 0, so decode dropped its NaN, which a call of all rows shows."""
    attend = compile_attention("pattern p\n    align end\n    visible k <= q\n    score scale * dot(q, k) - (q - k)\n")
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 300, 8, generator=generator) for _ in range(3))
    v[:, :, 0, 0] = math.nan
    with torch.no_grad():
        expected = attend(q, k, v)[:, :, -queries:]
        result = attend.decode(q[:, :, -queries:], k, v, kv_len=300)
    assert expected[..., 0].isnan().all() and result[..., 0].isnan().all()
    assert result[..., 1:].isfinite().all()
