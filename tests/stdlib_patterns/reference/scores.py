"""Patterns with their own scores, written from their papers, not from the `.attn` files.

q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → out (B, Hq, Nq, dv) and lse (B, Hq, Nq), in the tensors' own
dtype (lse in fp32 at least), dense and differentiable. The last query is at the last key. A row without visible keys
has out 0 and lse -inf.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import torch
from torch import Tensor

from reference.attention import Result, positions, products, scale_of, weighted

# --- functions of the distance ----------------------------------------------------------------------------------------


def alibi_slopes(heads: int) -> list[float]:
    """Press et al. 2022, and the authors' rule for numbers of heads that are not powers of two."""
    if heads & (heads - 1) == 0:
        return [2.0 ** (-8 * (head + 1) / heads) for head in range(heads)]
    lower = 1
    while 2 * lower < heads:
        lower *= 2
    return alibi_slopes(lower) + alibi_slopes(2 * lower)[::2][: heads - lower]


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Result:
    query, key = positions(q, k)
    slopes = torch.tensor(alibi_slopes(q.shape[1]), dtype=torch.float64)
    bias = slopes[:, None, None] * (key - query)
    return weighted(scale_of(q) * products(q, k) + bias.to(q.dtype), key <= query, v)


@cache
def t5_bucket(offset: int, buckets: int, far: int, causal: bool) -> int:
    """Raffel et al. 2020, for offset = key - query: half of the buckets exact, the others spaced by the logarithm.

    In integers: the step m of the logarithm is reached if (far / exact) ** m <= (n / exact) ** steps.
    """
    first = 0
    if not causal:
        buckets //= 2
        first = buckets if offset > 0 else 0
    n = max(-offset, 0) if causal else abs(offset)
    exact = buckets // 2
    if n < exact:
        return first + n
    steps, reached = buckets - exact, Fraction(n, exact) ** (buckets - exact)
    step = max(m for m in range(steps) if m == 0 or Fraction(far, exact) ** m <= reached)
    return first + exact + step


def t5(
    q: Tensor, k: Tensor, v: Tensor, *, table: Tensor, buckets: int = 32, far: int = 128, causal: bool = False
) -> Result:
    """Raffel et al. 2020: no scale; `table` (Hq, buckets)."""
    query, key = positions(q, k)
    bucket = (key - query).apply_(lambda offset: t5_bucket(offset, buckets, far, causal))
    visible = key <= query if causal else torch.ones_like(bucket, dtype=torch.bool)
    return weighted(products(q, k) + table[:, bucket].to(q.dtype), visible, v)


def music_relative(q: Tensor, k: Tensor, v: Tensor, *, E: Tensor) -> Result:
    """Huang et al. 2019; `E` (Hq, length, dk), whose last row is for a token and itself."""
    query, key = positions(q, k)
    rows = (key - query + E.shape[1] - 1).clamp(max=E.shape[1] - 1)
    relative = torch.einsum("bhqd,hqkd->bhqk", q, E[:, rows].to(q.dtype))
    return weighted((products(q, k) + relative) * scale_of(q), key <= query, v)


# --- functions of the inputs ------------------------------------------------------------------------------------------


def graphormer(q: Tensor, k: Tensor, v: Tensor, *, distance: Tensor, table: Tensor) -> Result:
    """Ying et al. 2021; `distance` (B, Nq, Nk), `table` (Hq, distances)."""
    bias = table[:, distance].transpose(0, 1).to(q.dtype)
    return weighted(scale_of(q) * products(q, k) + bias, torch.ones_like(distance, dtype=torch.bool)[:, None], v)


def fox(q: Tensor, k: Tensor, v: Tensor, *, f: Tensor) -> Result:
    """Lin et al. 2025; `f` (B, Nk, Hq), the logarithm of the forget gates, summed without differences of sums."""
    query, key = positions(q, k)
    gates = torch.where(key <= query, f.transpose(1, 2)[:, :, None].to(q.dtype), 0)
    from_here = gates.flip(-1).cumsum(-1).flip(-1)
    after = torch.cat([from_here[..., 1:], torch.zeros_like(from_here[..., :1])], -1)
    return weighted(scale_of(q) * products(q, k) + after, key <= query, v)


# --- functions of the score -------------------------------------------------------------------------------------------


def softcap(q: Tensor, k: Tensor, v: Tensor, *, cap: float = 50, window: int = 4096) -> Result:
    """Gemma 2: scores are limited by cap · tanh(score / cap), in a sliding window."""
    query, key = positions(q, k)
    score = cap * torch.tanh(scale_of(q) * products(q, k) / cap)
    return weighted(score, (key <= query) & (query - key < window), v)
