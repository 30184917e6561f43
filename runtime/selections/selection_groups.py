"""Heads that choose alike, and their part of what was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from attnc.compiler.planning.selected_keys import SelectedKeys
from attnc.compiler.planning.selected_tokens import SelectedTokens


@dataclass(frozen=True)
class SelectionGroup:
    """Heads of a batch entry that choose alike: `number` of `count`."""

    batch: int
    number: int
    count: int
    heads: slice
    kv_heads: slice

    @property
    def head(self) -> int:
        """The first query head."""
        return int(self.heads.start)

    def of(self, found: Tensor, dims: Sequence[str | int]) -> Tensor:
        """Its part of what was chosen, (rows, places); `dims`: batch entries and heads before these."""
        for dim in dims:
            at = min(self.batch, len(found) - 1) if dim == "batch" else self.number * len(found) // self.count
            found = found[at]
        return found


def lanes_of(choice: SelectedKeys | SelectedTokens, q: Tensor, k: Tensor) -> Iterator[SelectionGroup]:
    """The lanes of a call."""
    heads, kv_heads = q.shape[1], k.shape[1]
    count = heads if choice.by_head else kv_heads if choice.by_heads else min(heads, 1)
    for batch in range(q.shape[0]):
        for i in range(count):
            kv = i * kv_heads // count
            own = slice(i * heads // count, (i + 1) * heads // count)
            yield SelectionGroup(batch, i, count, own, slice(kv, max((i + 1) * kv_heads // count, kv + 1)))
