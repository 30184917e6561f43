"""TempCache and AnnSA, written from their definition."""

from __future__ import annotations

from torch import Tensor

from reference.attention import products, scale_of, weighted
from reference.routing import Result, by_query_head


def temp_cache(q: Tensor, k: Tensor, v: Tensor, *, merged: Tensor, qbucket: Tensor, kbucket: Tensor) -> Result:
    """Samuel et al. 2026: a key counts as often as it was merged; queries (B, Hq, Nq) see the keys of their bucket."""
    seen = qbucket[..., None] == by_query_head(kbucket, q.shape[1])[:, :, None]
    score = scale_of(q) * products(q, k) + by_query_head(merged, q.shape[1])[:, :, None].to(q.dtype).log()
    return seen, weighted(score, seen, v)[0]
