"""Heads that share a selection, and their slice of the selection tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from attnc.compiler.planning.selected_keys import SelectedKeys
from attnc.compiler.planning.selected_tokens import SelectedTokens


@dataclass(frozen=True)
class SelectionGroup:
    """Heads of a batch entry that share a selection: head group `number` of `count`."""

    batch: int
    number: int
    count: int
    heads: slice
    kv_heads: slice

    @property
    def head(self) -> int:
        """The first query head."""
        return int(self.heads.start)

    def of(self, selected: Tensor, dims: Sequence[str | int]) -> Tensor:
        """Return the head group's slice of a selection, (rows, blocks); `dims`: its leading dimensions."""
        for dim in dims:
            index = min(self.batch, len(selected) - 1) if dim == "batch" else self.number * len(selected) // self.count
            selected = selected[index]
        return selected


def head_groups_of(choice: SelectedKeys | SelectedTokens, q: Tensor, k: Tensor) -> Iterator[SelectionGroup]:
    """Yield the head groups of a call."""
    heads, kv_heads = q.shape[1], k.shape[1]
    count = heads if choice.by_head else kv_heads if choice.by_heads else min(heads, 1)
    for batch in range(q.shape[0]):
        for i in range(count):
            kv = i * kv_heads // count
            head_range = slice(i * heads // count, (i + 1) * heads // count)
            yield SelectionGroup(batch, i, count, head_range, slice(kv, max((i + 1) * kv_heads // count, kv + 1)))
