"""DHSA's selection of tokens by pieces, written from the paper's definition.

q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv); the piece of each key is `begin` to `stop` (B, Nk) → visible
pairs, bool (B, Hq, Nq, Nk), and out (B, Hq, Nq, dv). The last query is at the last key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.attention import positions
from reference.routing import best, softmax_over

Result = tuple[Tensor, Tensor]


def dhsa(
    q: Tensor, k: Tensor, v: Tensor, *, begin: Tensor, stop: Tensor, rows: int, topk: int, near: int, first: int
) -> Result:
    """Xiong et al. 2025: a piece's score is its mean key times the root of its length, averaged over heads."""
    query, key = positions(q, k)
    keys, queries = k.detach().mean(1), q.detach().mean(1)
    pieces = torch.empty_like(keys)
    for batch in range(k.shape[0]):
        for j in range(k.shape[2]):
            low, high = int(begin[batch, j]), int(stop[batch, j])
            pieces[batch, j] = keys[batch, low:high].mean(0) * math.sqrt(high - low)
    chosen = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
    for block in torch.unique(query // rows).tolist():
        own_rows = torch.nonzero(query[:, 0] // rows == block)[:, 0]
        end = int(query[own_rows[-1], 0]) + 1
        score = pieces @ queries[:, own_rows].mean(1)[..., None]
        forced = (key < first) | (key >= end - near)
        score = torch.where(forced, math.inf, score[..., 0])
        chosen[:, 0, own_rows] = best(score, (key < end).expand(score.shape), topk)[:, None]
    return softmax_over(q, k, v, chosen & (key <= query))
