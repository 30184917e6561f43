"""The reference executor: dense attention straight from the IR, in any dtype, differentiable as often as torch can.

It is O(Nq · Nk) in memory, and the oracle of every other executor.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.planning.build_plan import Relations


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


def attend(q: Tensor, k: Tensor, v: Tensor, relations: Relations, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of softmax attention over the visible keys.

    q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv), one dtype → out (B, Hq, Nq, dv) in that dtype, lse
    (B, Hq, Nq) natural log, fp32 (fp64 for fp64). A row without keys: out 0, lse -inf, gradients 0.
    """
    mask = dense_mask(relations).to(q.device)
    node = relations.pattern.attend
    group = max(q.shape[1] // max(k.shape[1], 1), 1)
    vectors = {"q": q, "k": k.repeat_interleave(group, 1), "v": v.repeat_interleave(group, 1)}
    score = _score(node.score, vectors, scale)
    seen = mask.any(-1, keepdim=True)
    score = score.masked_fill(~mask, -torch.inf)
    # A row of -inf alone has no gradient that is a number: such rows are computed as zeros and dropped at the end.
    score = torch.where(seen, score, torch.zeros((), dtype=score.dtype, device=score.device))
    lse = torch.logsumexp(score.to(_lse_dtype(q.dtype)), -1) if score.shape[-1] else score.sum(-1)
    weights = torch.where(seen, torch.softmax(score, -1), torch.zeros((), dtype=score.dtype, device=score.device))
    out = weights @ vectors[_value(node.value)]
    return out, torch.where(seen[..., 0], lse, torch.full_like(lse, -torch.inf)).to(_lse_dtype(q.dtype))


def _score(node: ir.Value, vectors: dict[str, Tensor], scale: float) -> Tensor:
    """A score over all pairs, (B, Hq, Nq, Nk)."""
    match node:
        case ir.Times(left=ir.Scale(), right=right):
            return _score(right, vectors, scale) * scale
        case ir.Dot(left=left, right=right):
            return vectors[left.tensor] @ vectors[right.tensor].transpose(-1, -2)
        case _:
            raise AssertionError(f"not a score of this language: {node}")


def _value(node: ir.Value) -> str:
    assert isinstance(node, ir.Vec)
    return node.tensor


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
