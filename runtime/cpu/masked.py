"""Attention of few tokens whose relation is a choice: one kernel call for all heads and batch entries, with a mask.

With few tokens the calls for each place, head and batch entry take longer than the pairs that these calls leave out.
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
from attnc.runtime.block_values import BlockValues
from attnc.runtime.cpu import flash_kernel, hidden_values
from attnc.runtime.cpu.autograd import Pair, Triple
from attnc.runtime.folded import AT_ONCE, entries_at_once, folded, folded_heads
from attnc.runtime.pair_blocks import Operands, PairBlock

WORK = 1 << 21
"""Pairs of a head times their width: about the time of the separate calls for that head."""


def has_few_tokens(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether one masked call takes less time than calls for what each head sees; never where a tensor is empty."""
    pairs = q.shape[2] * k.shape[2]
    return bool(q.numel() and k.numel() and v.numel()) and pairs * max(q.shape[-1] + v.shape[-1], 32) <= WORK


def seen_pairs(relations: Relations) -> Tensor:
    """The visible pairs of a call without documents: bool (batch, heads, queries, keys).

    Raises EvaluationError where the relation faults.
    """
    shape, visible = relations.shape, relations.pattern.attend.visible
    pairs = (shape.heads, shape.n_q, shape.n_k)
    found = torch.zeros((shape.batch, *pairs), dtype=torch.bool)
    q, k = ([torch.empty((heads, 0, 0))] * shape.batch for heads in (shape.heads, shape.kv_heads))  # no vector is read
    origins = relations.pattern.origins
    operands = Operands(q, k, k, {}, relations.sizes, relations.slices, 1.0, torch.float32, origins)
    for entries in entries_at_once(shape.batch, math.prod(pairs), AT_ONCE):
        (window,) = relations.windows(entries.start)
        heads = folded_heads(range(shape.heads), entries, shape.heads)
        alive = np.ones((1, *pairs[1:]), dtype=np.bool_)
        block = PairBlock(entries.start, heads, window, np.arange(shape.n_q), np.arange(shape.n_k), alive)
        holds = torch.from_numpy(BlockValues(folded(operands, entries), block).holds(visible))
        found[entries.start : entries.stop] = holds.expand(len(heads), *pairs[1:]).reshape(len(entries), *pairs)
    return found


@dataclass(frozen=True, eq=False)
class Masked:
    """The work of one call; its input is what each row sees, bool (batch, heads, queries, keys)."""

    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """(out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv)."""
        (seen,) = inputs
        found = [hidden_values.forward(partial(self._run, seen[at]), q[at], k[at], v[at]) for at in _cut(seen)]
        out, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
        return out, lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """(dq, dk, dv)."""
        q, k, v, out, lse, seen = kept
        found = []
        for at in _cut(seen):
            run, gradients = partial(self._run, seen[at]), partial(self._gradients, seen[at])
            vectors, results = (q[at], k[at], v[at]), (out[at], lse[at])
            of_lse = None if grad_lse is None else grad_lse[at]
            found.append(hidden_values.backward(run, gradients, grad_out[at], of_lse, vectors, results))
        dq, dk, dv = (torch.cat(parts).to(q.dtype) for parts in zip(*found, strict=True))
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
        found = flash_kernel.attend_backward(grad_out, q, k, v, out, lse, mask, False, self.scale)
        dq, dk, dv = (x[..., :own] for x, own in zip(found, widths, strict=True))
        return dq, dk, dv


def _cut(seen: Tensor) -> list[slice]:
    """Batch entries whose masks are made at once."""
    parts = entries_at_once(len(seen), seen[:1].numel(), AT_ONCE)
    return [slice(entries.start, entries.stop) for entries in parts]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask of the visible pairs: 0 where visible, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)


__all__ = ["Masked", "has_few_tokens", "seen_pairs"]
