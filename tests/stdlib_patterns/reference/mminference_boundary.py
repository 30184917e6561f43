"""MMInference's boundary heads with windows, written from their definition."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.routing import Result, softmax_over


def pair_sees(kinds: list[bool], q: int, k: int, window: int, sinks: int, *, split_keys: bool) -> bool:
    """Return whether the query at q sees the key at k <= q in a window or a sink, among keys of k's kind or all."""
    mine = [j for j in range(q + 1) if not split_keys or kinds[j] == kinds[k]]
    index = mine.index(k)
    return len(mine) - index <= window or index < sinks


def mminference_boundary(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    vision: Tensor,
    visuals: Tensor,
    window: list[int],
    sinks: list[int],
    split_keys: bool,
) -> Result:
    """Li et al. 2025: vision (B, Nk) splits the tokens into kinds; `visuals`, its running count, is not read here."""
    n_q, n_k = q.shape[2], k.shape[2]
    seen = torch.zeros(q.shape[0], 1, n_q, n_k, dtype=torch.bool)
    for b, kinds in enumerate(vision.tolist()):
        for row in range(n_q):
            position = n_k - n_q + row
            for j in range(position + 1):
                pair = 2 * kinds[position] + kinds[j]
                seen[b, 0, row, j] = pair_sees(kinds, position, j, window[pair], sinks[pair], split_keys=split_keys)
    return softmax_over(q, k, v, seen)
