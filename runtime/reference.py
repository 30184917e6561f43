"""The reference executor: dense attention straight from the IR, in any dtype, differentiable as often as torch can.

It is O(Nq · Nk) in memory, and the oracle of every other executor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.values import is_plain
from attnc.runtime.values import Block, Operands, Values


def dense_mask(relations: Relations) -> Tensor:
    """The relation of a call: bool (batch or 1, heads or 1, Nq, Nk), on the CPU.

    Raises EvaluationError where the relation faults.
    """
    shape = relations.shape
    n_q, n_k = shape.n_q, shape.n_k
    groups = relations.groups()
    if len(groups) == 1:
        batches, heads, _ = groups[0]
        if len(batches) == shape.batch and len(heads) == shape.heads and batches and heads:
            return torch.from_numpy(relations.mask(0, 0, 0, n_q, 0, n_k))[None, None]
    mask = np.zeros((shape.batch, shape.heads, n_q, n_k), dtype=np.bool_)
    for batches, heads, _ in groups:
        if batches and heads:
            mask[np.ix_(batches, heads)] = relations.mask(batches[0], heads[0], 0, n_q, 0, n_k)
    return torch.from_numpy(mask)


def attend(
    q: Tensor, k: Tensor, v: Tensor, relations: Relations, scale: float, inputs: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of softmax attention over the visible keys.

    q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv), one dtype → out (B, Hq, Nq, dv) in that dtype, lse
    (B, Hq, Nq) natural log, fp32 (fp64 for fp64). A row without keys: out 0, lse -inf, gradients 0. `inputs` are the
    real ones.
    """
    mask = dense_mask(relations).to(q.device)
    node = relations.pattern.attend
    seen = mask.any(-1, keepdim=True)
    if is_plain(node):
        group = max(q.shape[1] // max(k.shape[1], 1), 1)
        score, extra = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scale, None
    else:
        score, extra = _values(q, k, relations, scale, inputs or {}, mask)
    score = score.masked_fill(~mask, -torch.inf)
    # A row of -inf alone has no gradient that is a number: such rows are computed as zeros and dropped at the end.
    score = torch.where(seen, score, torch.zeros((), dtype=score.dtype, device=score.device))
    lse = torch.logsumexp(score.to(_lse_dtype(q.dtype)), -1) if score.shape[-1] else score.sum(-1)
    if extra is None:
        weights = torch.softmax(score, -1)
    else:
        lse = torch.logaddexp(lse, torch.where(seen[..., 0], extra, torch.zeros_like(extra)))
        weights = torch.exp(score - lse[..., None])
    weights = torch.where(seen, weights, torch.zeros((), dtype=score.dtype, device=score.device)).to(v.dtype)
    out = weights @ v.repeat_interleave(max(q.shape[1] // max(v.shape[1], 1), 1), 1)
    lse = torch.where(seen[..., 0], lse, torch.full_like(lse, -torch.inf)).to(_lse_dtype(q.dtype))
    if is_plain(node):
        return out, lse
    return _depending(out, q, k, v, *(inputs or {}).values()), _depending(lse, q, k, *(inputs or {}).values())


class _Depending(torch.autograd.Function):
    """A result that has gradients, perhaps zeros, to all of its operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(torch.zeros_like(x) if x.is_floating_point() else None for x in ctx.saved_tensors)


def _depending(x: Tensor, *operands: Tensor) -> Tensor:
    return cast("Tensor", _Depending.apply(x, *operands))  # type: ignore[no-untyped-call]


def _values(
    q: Tensor, k: Tensor, relations: Relations, scale: float, inputs: Mapping[str, Tensor], mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scores (B, Hq, Nq, Nk), of anything where nobody looks, and the logarithm of what `extra` adds (B, Hq, Nq)."""
    node, dtype = relations.pattern.attend, _lse_dtype(q.dtype)
    operands = Operands(q, k, inputs, relations.sizes, relations.slices, scale, dtype, relations.pattern.origins)
    heads = tuple(range(q.shape[1]))
    score = torch.zeros((*q.shape[:3], k.shape[2]), dtype=dtype, device=q.device)
    extra = None if node.weights.extra is None else torch.zeros(q.shape[:3], dtype=dtype, device=q.device)
    alive = mask.expand(score.shape).cpu().numpy()
    for batch in range(q.shape[0]):
        for window in relations.windows(batch):
            rows, keys = slice(window.row, window.row + window.n_q), slice(window.key, window.key + window.n_k)
            here = alive[batch, :, rows, keys]
            if not here.any():
                continue
            block = Block(batch, heads, window, np.arange(window.n_q), np.arange(window.n_k), here)
            values = Values(operands, block)
            score[batch, :, rows, keys] = values.of(node.score)
            if extra is not None and node.weights.extra is not None:
                extra[batch, :, rows] = values.logit(node.weights.extra)
    return score, extra


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
