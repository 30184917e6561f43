"""Attention of few tokens with selections: one masked kernel call for all heads and batch entries.

With few tokens, separate calls for each block, head and batch entry take longer than the pairs that they skip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.executors.cpu.work_items import (
    GroupedWork,
    ItemGroup,
    TokenSlice,
    WorkItem,
    kernel_mask,
)
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
class Masked(GroupedWork):
    """The work of one call; its input is the mask of visible pairs, bool (batch, heads, queries, keys)."""

    scale: float

    def groups(self, q: Tensor, k: Tensor, inputs: Sequence[Tensor], *, backward: bool) -> Iterator[ItemGroup]:
        """Yield the batch entries whose masks are built at once."""
        (seen,) = inputs
        everywhere = TokenSlice(slice(None))
        for entries in entries_at_once(len(seen), seen[:1].numel(), AT_ONCE):
            part = slice(entries.start, entries.stop)
            item = WorkItem((everywhere,) * 5, (everywhere,) * 2, fresh=True)
            yield ItemGroup(part, slice(None), slice(None), [(item, kernel_mask(~seen[part], q.dtype))])


__all__ = ["Masked", "has_few_tokens", "seen_pairs"]
