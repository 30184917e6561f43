"""Attention of few tokens with selections: one masked kernel call for all heads and batch entries.

With few tokens, separate calls for each block, head and batch entry take longer than the pairs that they skip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.executors.cpu import flash_kernel, hidden_values
from attnc.runtime.executors.cpu.autograd import Pair, Triple
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.folded import (
    AT_ONCE,
    entries_at_once,
    folded,
    folded_heads,
)
from attnc.runtime.values.pair_blocks import Operands, PairBlock

WORK = 1 << 21
"""Pairs of a head times their width, which take about as long as the separate calls for that head."""


def has_few_tokens(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Check whether one masked call is faster than separate calls by head and block; False if a tensor is empty."""
    pairs = q.shape[2] * k.shape[2]
    return bool(q.numel() and k.numel() and v.numel()) and pairs * max(q.shape[-1] + v.shape[-1], 32) <= WORK


def seen_pairs(relations: Relations) -> Tensor:
    """Return the visible pairs of a call without documents: bool (batch, heads, queries, keys).

    Raises EvaluationError if the relation is undefined somewhere.
    """
    shape, visible = relations.shape, relations.pattern.attend.visible
    pairs = (shape.heads, shape.n_q, shape.n_k)
    pairs_by_entry = torch.zeros((shape.batch, *pairs), dtype=torch.bool)
    q, k = ([torch.empty((heads, 0, 0))] * shape.batch for heads in (shape.heads, shape.kv_heads))  # no vector is read
    origins = relations.pattern.origins
    operands = Operands(q, k, k, {}, relations.sizes, relations.slices, 1.0, torch.float32, origins)
    for entries in entries_at_once(shape.batch, math.prod(pairs), AT_ONCE):
        (window,) = relations.windows(entries.start)
        heads = folded_heads(range(shape.heads), entries, shape.heads)
        active = np.ones((1, *pairs[1:]), dtype=np.bool_)
        block = PairBlock(entries.start, heads, window, np.arange(shape.n_q), np.arange(shape.n_k), active)
        holds = torch.from_numpy(BlockValues(folded(operands, entries), block).holds(visible))
        pairs_by_entry[entries.start : entries.stop] = holds.expand(len(heads), *pairs[1:]).reshape(
            len(entries), *pairs
        )
    return pairs_by_entry


@dataclass(frozen=True, eq=False)
class Masked:
    """The work of one call; its input is the mask of visible pairs, bool (batch, heads, queries, keys)."""

    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """Compute (out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv)."""
        (seen,) = inputs
        results = [
            hidden_values.forward(partial(self._run, seen[entries]), q[entries], k[entries], v[entries])
            for entries in _cut(seen)
        ]
        out, lse = (torch.cat(parts) for parts in zip(*results, strict=True))
        return out, lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """Compute (dq, dk, dv)."""
        q, k, v, out, lse, seen = kept
        gradients_by_part = []
        for entries in _cut(seen):
            run, gradients = partial(self._run, seen[entries]), partial(self._gradients, seen[entries])
            vectors, results = (q[entries], k[entries], v[entries]), (out[entries], lse[entries])
            of_lse = None if grad_lse is None else grad_lse[entries]
            gradients_by_part.append(
                hidden_values.backward(run, gradients, grad_out[entries], of_lse, vectors, results)
            )
        dq, dk, dv = (torch.cat(parts).to(q.dtype) for parts in zip(*gradients_by_part, strict=True))
        return dq, dk, dv

    def _run(self, seen: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Pair:
        width, wide = max(q.shape[-1], v.shape[-1]), v.shape[-1]
        q, k, v = (flash_kernel.padded(x, width) for x in (q, k, v))
        out, lse = flash_kernel.attend(q, k, v, _additive(seen, q.dtype), False, self.scale)
        blind = ~seen.any(-1)
        if bool(blind.any()):
            out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -math.inf)
        return out[..., :wide], lse

    def _gradients(
        self,
        seen: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        vectors: tuple[Tensor, Tensor, Tensor],
        results: Sequence[Tensor],
    ) -> Triple:
        q, k, v = vectors
        out, lse = results
        widths, mask = [x.shape[-1] for x in vectors], _additive(seen, q.dtype)
        lse, grad_out, grad_lse = flash_kernel.without_blind_rows(lse, grad_out, grad_lse)
        if grad_lse is not None:
            grad_out, q, k, v, out = flash_kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
        width = max(q.shape[-1], v.shape[-1])
        grad_out, q, k, v, out = (flash_kernel.padded(x, width) for x in (grad_out, q, k, v, out))
        padded_grads = flash_kernel.attend_backward(grad_out, q, k, v, out, lse, mask, False, self.scale)
        dq, dk, dv = (x[..., :width_of_grad] for x, width_of_grad in zip(padded_grads, widths, strict=True))
        return dq, dk, dv


def _cut(seen: Tensor) -> list[slice]:
    """Return the batch entries whose masks are built at once."""
    parts = entries_at_once(len(seen), seen[:1].numel(), AT_ONCE)
    return [slice(entries.start, entries.stop) for entries in parts]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive mask of the visible pairs: 0 where visible, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)


__all__ = ["Masked", "has_few_tokens", "seen_pairs"]
