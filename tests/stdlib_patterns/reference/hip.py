"""InfiniteHiP's descents in stages, one chunk after another, written from the paper and its authors' program.

q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → seen pairs, bool (B, Hq, Nq, Nk), and out (B, Hq, Nq, dv).
The last query is at the last key; selections have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reference.attention import positions
from reference.routing import by_query_head, softmax_over

Result = tuple[Tensor, Tensor]


def descend(score: Tensor, left: int, size: int) -> int:
    """Return the token at which halving ends: the half with the better middle token is kept, the left one if equal."""
    while size > 1:
        size //= 2
        right = left + size
        if float(score[right + size // 2]) > float(score[left + size // 2]):
            left = right
    return left


def chosen_by(
    queries: Tensor,
    keys: Tensor,
    limit: int,
    *,
    stages: Sequence[int],
    kept: Sequence[int],
    strides: Sequence[int],
    sinks: int,
) -> Tensor:
    """Return the keys (Nk, dk) that a block of queries (n, dk) selects; chunks begin at `limit` at the latest."""
    tokens = torch.ones(len(keys), dtype=torch.bool)
    for size, limit_of_stage, stride in zip(stages, kept, strides, strict=True):
        score = (queries[::stride] @ keys.T).amax(0)
        starts = [i for i in range(0, len(keys), size) if sinks <= i <= limit and bool(tokens[i])]
        ranked = sorted(starts, key=lambda start: -float(score[descend(score, start, size)]))
        tokens = torch.zeros(len(keys), dtype=torch.bool)
        for start in ranked[: limit_of_stage // size]:
            tokens[start : start + size] = True
    return tokens


def hip(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    stages: Sequence[int],
    kept: Sequence[int],
    strides: Sequence[int],
    rows: int,
    sinks: int,
    window: int,
) -> Result:
    """Lee et al. 2025: the first tokens, a window, and the tokens of the chunks that the last stage keeps."""
    query, key = positions(q, k)
    chosen = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    heads = by_query_head(k, q.shape[1]).detach()
    for block in torch.unique(query // rows).tolist():
        own_rows = torch.nonzero(query[:, 0] // rows == block)[:, 0]
        limit = int(query[own_rows[0], 0]) - window
        for batch in range(q.shape[0]):
            for head in range(q.shape[1]):
                chosen[batch, head, own_rows] = chosen_by(
                    q.detach()[batch, head, own_rows],
                    heads[batch, head],
                    limit,
                    stages=stages,
                    kept=kept,
                    strides=strides,
                    sinks=sinks,
                )
    return softmax_over(q, k, v, (key <= query) & ((key < sinks) | (query - key < window) | chosen))
