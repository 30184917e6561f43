"""Superlinear attention with two steps, written from its definition."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from reference.attention import positions, products, scale_of, weighted
from reference.routing import Result, best


def reach(times: float, n: int) -> int:
    """Compute ⌈times · √n⌉ for a decimal number: the least x with x² ≥ times² · n."""
    square = Fraction(str(times)) ** 2 * n
    return math.isqrt(math.ceil(square) - 1) + 1 if square > 0 else 0


def superlinear(
    q: Tensor, k: Tensor, v: Tensor, *, search: Tensor, near: int, topk: int, back: float = 2, ahead: float = 0
) -> Result:
    """Huang 2026: anchors i² - 1 tokens back, i > near; each selected anchor's span is read together with the window.

    `seen` is the union of the keys of all reads of a query.
    """
    query, key = positions(q, k)
    score, ranked = scale_of(q) * products(q, k), products(search, k)
    window = (key <= query) & (query - key < (near + 1) ** 2 - 1)
    rows, seen = [], window.expand(score.shape).clone()
    for row, t in enumerate(query[:, 0].tolist()):
        anchors = torch.tensor([t - (i * i - 1) for i in range(near + 1, math.isqrt(t + 1) + 1)], dtype=torch.long)
        if not len(anchors):
            rows.append(weighted(score[:, :, row : row + 1], window[row].expand(score[:, :, :1].shape), v)[0])
            continue
        anchor_scores = ranked[:, :, row, anchors]
        chosen = best(anchor_scores.detach(), torch.ones_like(anchor_scores, dtype=torch.bool), topk)
        share = torch.softmax(torch.where(chosen, anchor_scores, -math.inf), -1)
        read = torch.zeros(*q.shape[:2], 1, v.shape[-1], dtype=q.dtype)
        for n, anchor in enumerate(anchors.tolist()):
            span = (key >= anchor - reach(back, t + 1)) & (key <= anchor + reach(ahead, t + 1)) & (key <= t)
            both = (span | window[row]).expand(score[:, :, :1].shape)
            read = read + share[:, :, n, None, None] * weighted(score[:, :, row : row + 1], both, v)[0]
            seen[:, :, row] |= chosen[:, :, n, None] & span
        rows.append(read)
    return seen, torch.cat(rows, 2)
