"""MMInference's grid heads, one residue after another, written from the paper's definition.

q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → seen pairs, bool (B, Hq, Nq, Nk), and out (B, Hq, Nq, dv).
The last query is at the last key; Nq is at least `probe`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reference.attention import positions, products, scale_of
from reference.routing import probabilities, softmax_over

Result = tuple[Tensor, Tensor]


def mminference_grid(q: Tensor, k: Tensor, v: Tensor, *, strides: Sequence[int], probe: int) -> Result:
    """Li et al. 2025: the residue whose keys have the largest mean weight for the last queries, which see all keys."""
    query, key = positions(q, k)
    causal = key <= query
    weights = probabilities((scale_of(q) * products(q, k)).detach()[:, :, -probe:], causal[-probe:])
    chosen = torch.zeros(*q.shape[:2], 1, k.shape[2], dtype=torch.bool)
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            best_weight = -1.0
            for stride in strides:
                for phase in range(stride):
                    residue_keys = key % stride == phase
                    pairs = causal[-probe:] & residue_keys
                    mass = float(weights[batch, head][pairs].mean()) if bool(pairs.any()) else 0.0
                    if mass > best_weight:
                        best_weight, chosen[batch, head, 0] = mass, residue_keys
    return softmax_over(q, k, v, causal & (chosen | (query >= k.shape[2] - probe)))
