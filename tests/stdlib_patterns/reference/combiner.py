"""Combiner's axial, log-sparse and mixed forms, written from the paper and its authors' program.

q (B, Hq, N, dk), k (B, Hkv, N, dk), v (B, Hkv, N, dv) → None, as summaries are not tokens, and out (B, Hq, N, dv). One
softmax runs over tokens and summaries. The maximum over a span gives its gradient to the first of equal entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.attention import products, weighted
from reference.routing import by_query_head
from reference.structures import first_largest

Output = tuple[None, Tensor]


def combiner_axial(q: Tensor, k: Tensor, v: Tensor, *, scale: float, width: int) -> Output:
    """Rows have `width` tokens; a row's summary for a column is the output of its token there, attending to the row."""
    n, k, v = q.shape[2], by_query_head(k, q.shape[1]), by_query_head(v, q.shape[1])
    row, column = torch.arange(n) // width, torch.arange(n) % width
    score = scale * products(q, k)
    same = row == row[:, None]
    summary, _ = weighted(score, same.expand(score.shape), v)
    own_row = same & (column <= column[:, None])
    above = (column == column[:, None]) & (row < row[:, None])
    visible = torch.cat([own_row, above], -1).expand(*q.shape[:3], -1)
    return None, weighted(torch.cat([score, score], -1), visible, torch.cat([v, summary], 2))[0]


def span_summary(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return key and value (B, H, 1, ·) of a span: its largest keys, and the output of its largest queries over it."""
    probe = first_largest(q)
    return first_largest(k), torch.softmax(scale * products(probe, k), -1) @ v


def combiner_log_sparse(q: Tensor, k: Tensor, v: Tensor, *, scale: float, levels: int) -> Output:
    """The past of token i is split by the ones in the binary number i, the largest span first, each with a summary."""
    k, v, rows = by_query_head(k, q.shape[1]), by_query_head(v, q.shape[1]), []
    for i in range(q.shape[2]):
        keys, values, start = [k[:, :, i : i + 1]], [v[:, :, i : i + 1]], 0
        for level in reversed(range(levels)):
            if i >> level & 1:
                span = slice(start, start + (1 << level))
                key, value = span_summary(q[:, :, span], k[:, :, span], v[:, :, span], scale)
                keys.append(key)
                values.append(value)
                start = span.stop
        score = scale * products(q[:, :, i : i + 1], torch.cat(keys, 2))
        rows.append(torch.softmax(score, -1) @ torch.cat(values, 2))
    return None, torch.cat(rows, 2)


def combiner_mixture(q: Tensor, k: Tensor, v: Tensor, *, scale: float, width: int) -> Output:
    """Token (y, x) sees its row up to itself and its column, the tops of other columns, and both sides of earlier rows.

    The query of a span is the maximum of its queries; the side spans are those left and right of x.
    """
    k, v = by_query_head(k, q.shape[1]), by_query_head(v, q.shape[1])
    grids = [x.reshape(*x.shape[:2], -1, width, x.shape[3]) for x in (q, k, v)]
    rows = []
    for y in range(grids[0].shape[2]):
        for x in range(width):
            keys = [grids[1][:, :, y, : x + 1], grids[1][:, :, :y, x]]
            values = [grids[2][:, :, y, : x + 1], grids[2][:, :, :y, x]]
            spans = [[g[:, :, :y, c] for g in grids] for c in range(width) if c != x and y]
            spans += [[g[:, :, r, :x] for g in grids] for r in range(y) if x]
            spans += [[g[:, :, r, x + 1 :] for g in grids] for r in range(y) if x + 1 < width]
            for probes, span_k, span_v in spans:
                key, value = span_summary(probes, span_k, span_v, scale)
                keys.append(key)
                values.append(value)
            score = scale * products(grids[0][:, :, y, x : x + 1], torch.cat(keys, 2))
            rows.append(torch.softmax(score, -1) @ torch.cat(values, 2))
    return None, torch.cat(rows, 2)
