"""Patterns with weights other than a plain softmax, written from their definitions, not from the `.attn` files.

q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → out (B, Hq, Nq, dv), and lse (B, Hq, Nq) where a `Result` is
returned: dense, in the tensors' own dtype (one for a whole call) and on their device, differentiable in every real
input. The last query is at the last key. A row without visible keys has out 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.attention import (
    Result,
    causal,
    normalised,
    positions,
    products,
    scale_of,
    shared,
    shares,
    softplus,
    unit,
    weighted,
)


def gpt_oss(q: Tensor, k: Tensor, v: Tensor, *, sink: Tensor, window: int = 128) -> Result:
    """A short window; `sink` (Hq) adds its exponential to the denominator."""
    query, key = positions(q, k)
    return weighted(scale_of(q) * products(q, k), (key <= query) & (query - key < window), v, sink)


def softplus_shares(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of LSSA, the visible pairs (Nq, Nk), and the number of keys that a query sees (Nq, 1)."""
    visible = causal(q, k)
    count = visible.sum(-1, keepdim=True).clamp(min=1).to(q.dtype)
    score = math.log(q.shape[-1]) * count.log() * products(unit(q), unit(k))
    return normalised(torch.where(visible, softplus(score), 0)), visible, count


def softplus_lssa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LSSA: softplus(log d · log n · cos), divided by its sum; n counts the visible keys."""
    weight, _, _ = softplus_shares(q, k)
    return weight @ shared(v, q)


def softplus_lssar(q: Tensor, k: Tensor, v: Tensor, *, power: int = 15, offset: float = 1.0) -> Tensor:
    """LSSAR: relu(n · LSSA - offset) ** power, divided by its sum; no offset in the rows of the first three positions.

    A row whose weights are all cut off is 0.
    """
    weight, visible, count = softplus_shares(q, k)
    query, _ = positions(q, k)
    sharp = torch.where(visible, torch.relu(count * weight - offset * (query >= 3).to(q.dtype)), 0)
    peak = sharp.detach().amax(-1, keepdim=True)  # cancels in the quotient; without it the power overflows
    return normalised((sharp / torch.where(peak > 0, peak, 1)) ** power) @ shared(v, q)


def affine_scaled(q: Tensor, k: Tensor, v: Tensor, *, scale: float, alpha: Tensor, beta: Tensor) -> Tensor:
    """Affine-scaled attention: (alpha softmax + beta) v over the visible keys; `alpha` and `beta` (B, Hq, Nq)."""
    visible = causal(q, k)
    weight = alpha[..., None] * shares(scale * products(q, k), visible) + beta[..., None]
    return torch.where(visible, weight, 0) @ shared(v, q)


def landmark(q: Tensor, k: Tensor, v: Tensor, *, scale: float, block: int) -> Tensor:
    """Mohtashami & Jaggi 2023, grouped softmax in training; a landmark is the last of every block + 1 tokens.

    A query divides its weight among the tokens of its own block and the landmarks of earlier blocks; a landmark passes
    its weight on to the tokens of its block. The landmark of the own block is hidden, also in its own row.
    """
    query, key = positions(q, k)
    own_block, mark = query // (block + 1) == key // (block + 1), key % (block + 1) == block
    score, v = scale * products(q, k), shared(v, q)
    share = shares(score, (key <= query) & (own_block != mark))
    out = torch.where(mark, 0, share) @ v
    for door in key[mark].tolist():
        room = slice(door - block, door)
        out = out + share[..., door : door + 1] * (torch.softmax(score[..., room], -1) @ v[:, :, room])
    return out


def local_linear(q: Tensor, k: Tensor, v: Tensor, *, scale: float, ridge: float) -> Tensor:
    """LLA: causal local linear regression around every query, solved exactly.

    With weights of sum 1 the ridge needs no factor ω; the sign · δ of the code's denominator is left out.
    """
    weight = shares(scale * products(q, k), causal(q, k))
    d = shared(k, q)[:, :, None] - q[:, :, :, None]
    mu = torch.einsum("bhqk,bhqkd->bhqd", weight, d)
    sigma = torch.einsum("bhqk,bhqkd,bhqke->bhqde", weight, d, d)
    rho: Tensor = torch.linalg.solve(sigma + ridge * torch.eye(q.shape[-1], dtype=q.dtype, device=q.device), mu)
    tilt = 1 - torch.einsum("bhqd,bhqkd->bhqk", rho, d)
    return (weight * tilt / (1 - (mu * rho).sum(-1, keepdim=True))) @ shared(v, q)
