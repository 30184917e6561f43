"""Building blocks of the attention references: positions, products, and a softmax over visible keys.

q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv); query head h reads kv head h // (Hq // Hkv). The last query
is at the last key. A row without visible keys has out 0 and lse -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]
"""out (B, Hq, Nq, dv) and lse (B, Hq, Nq), lse in fp32 at least."""


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of queries (Nq, 1) and keys (Nk), on the device of q."""
    n_q, n_k = q.shape[2], k.shape[2]
    return torch.arange(n_k - n_q, n_k, device=q.device)[:, None], torch.arange(n_k, device=q.device)


def products(q: Tensor, k: Tensor) -> Tensor:
    """Compute q · k of every pair, (B, Hq, Nq, Nk)."""
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)


def scale_of(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def weighted(score: Tensor, visible: Tensor, v: Tensor, sink: Tensor | None = None) -> Result:
    """Apply softmax over the visible keys; a sink (Hq) is one more key of value 0 in every row with a visible key."""
    seen = visible.any(-1, keepdim=True).expand(*score.shape[:-1], 1)
    score = torch.where(visible, score, -math.inf)
    v = v.repeat_interleave(score.shape[1] // v.shape[1], 1)
    if sink is not None:
        score = torch.cat([score, sink[:, None, None].to(score.dtype).expand_as(seen)], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], -2)
    score = torch.where(seen, score, 0)
    lse = torch.logsumexp(score.to(torch.promote_types(score.dtype, torch.float32)), -1)
    out = torch.where(seen, torch.softmax(score, -1), 0) @ v
    return out, torch.where(seen[..., 0], lse, -math.inf)


def causal(q: Tensor, k: Tensor) -> Tensor:
    """Return the pairs (Nq, Nk) without a later key."""
    query, key = positions(q, k)
    return key <= query


def shared(x: Tensor, q: Tensor) -> Tensor:
    """Repeat keys or values (B, Hkv, …) for every query head, (B, Hq, …)."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def shares(score: Tensor, visible: Tensor) -> Tensor:
    """Compute the softmax over the visible keys; 0 throughout a row without any."""
    seen = visible.any(-1, keepdim=True)
    return torch.where(visible, torch.softmax(torch.where(visible | ~seen, score, -math.inf), -1), 0)


def normalised(weight: Tensor) -> Tensor:
    """Divide nonnegative weights by their sum; a row of zeros stays 0."""
    total = weight.sum(-1, keepdim=True)
    return torch.div(weight, torch.where(total > 0, total, 1))


def rms(x: Tensor) -> Tensor:
    """Compute x / sqrt(mean(x²)) over the last axis, 0 for 0."""
    square = x.square().mean(-1, keepdim=True)
    return torch.where(square > 0, x * torch.where(square > 0, square, 1).rsqrt(), 0)


def unit(x: Tensor) -> Tensor:
    """Compute x / |x| over the last axis, 0 for 0."""
    return rms(x) / math.sqrt(x.shape[-1])


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)) without the threshold of `F.softplus`, whose error is 2e-9."""
    return torch.logaddexp(x, torch.zeros_like(x))
