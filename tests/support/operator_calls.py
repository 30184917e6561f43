"""Calls of an Attention, and of the operators below it, with all their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnc import Attention, compile_attention

ATTEND = torch.ops.attnc.attend.default
ATTEND_BACKWARD = torch.ops.attnc.attend_backward.default
BY_HEAD = "pattern by_head(window: int[head])\n    align end\n    visible 0 <= q - k < window\n"
DOC = torch.tensor([[0] * 7 + [1] * 10, [0] * 2 + [1] * 15])
"""Document ids for a batch of 2 and 17 tokens."""


def window() -> Attention:
    return compile_attention("sliding_window", window=5, sinks=1)


def text_of(attend: Attention) -> str:
    return attend._core.planner.text


def draw(
    n: int = 17,
    *,
    n_k: int | None = None,
    kv_heads: int = 4,
    dv: int = 8,
    tokens_first: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Draw q, k and v: batch 2, 4 query heads, dk 8."""
    shapes = ((4, n, 8), (kv_heads, n_k or n, 8), (kv_heads, n_k or n, dv))
    return [
        torch.randn(2, length, h, d, dtype=dtype).transpose(1, 2)
        if tokens_first
        else torch.randn(2, h, length, d, dtype=dtype)
        for h, length, d in shapes
    ]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def loss(out: Tensor, lse: Tensor) -> Tensor:
    """Return a loss of both results; rows without visible keys have no finite LSE."""
    return out.float().square().sum() + lse.masked_fill(lse == -torch.inf, 0).sin().sum()


def results(function: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Return out, lse and the gradients of q, k and v through both."""
    inputs = leaves(tensors)
    pair = function(*inputs, **options)
    return [*pair, *torch.autograd.grad(loss(*pair), inputs)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a, b)


class Layer(nn.Module):
    """A module that holds an Attention."""

    def __init__(self, attend: Attention) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = self.attend(q * 2, k, v, return_lse=True, **options)
        return out + 1, lse
