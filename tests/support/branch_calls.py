"""Small patterns with their own branches, keys and weights: operands, and dense torch to compute their results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnc import compile_attention
from cases.case import leaf, real
from weight_calls import check

Dense = Callable[..., Tensor]


def operands(n_q: int, n_k: int | None = None, *, d: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    n_k = n_q if n_k is None else n_k
    sizes = {"q": (2, 4, n_q, d), "k": (2, 2, n_k, d), "v": (2, 2, n_k, d)}
    return {name: leaf(real(*size), dtype) for name, size in sizes.items()}


def wide(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 1)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ wide(k).mT) / math.sqrt(q.shape[-1])


def softmax(score: Tensor, mask: Tensor) -> Tensor:
    """Apply softmax over visible keys; rows without visible keys are 0."""
    seen = mask.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(mask | ~seen, score, -math.inf), -1)
    return torch.where(seen, weights, 0)


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]


def both(text: str, dense: Dense, operands: dict[str, Tensor], **params: Any) -> None:
    """Check that the cpu executor and the reference agree with the formula, gradients included."""
    attend: Any = compile_attention(text, **params)
    for run in (attend, attend.reference):
        check(lambda call=run, **x: call(**x), dense, operands)


FAMILY = """pattern scales(scales: int = 3)
    input mix: real[batch, head, query, m]
    branch at[c in 0 .. scales]
        visible 0 <= q - k < 3 * 2 ** c and (q - k) % 2 ** c == 0
    combine sum(mix[q, c] * at[c] for c in 0 .. scales)
"""
