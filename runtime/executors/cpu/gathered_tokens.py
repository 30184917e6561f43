"""Attention among selected tokens: queries, keys and values are gathered, attended in blocks, and scattered back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.compiler.planning.selected_tokens import GatheredRelation, Int64
from attnc.runtime.executors.cpu.work_items import (
    EVERYTHING,
    GroupedWork,
    ItemGroup,
    Step,
    TokenSlice,
    WorkItem,
    kernel_mask,
)


@dataclass(frozen=True, eq=False)
class GatheredHeads:
    """Heads that share a selection, with their tokens in ascending order."""

    batch: int
    heads: slice
    kv_heads: slice
    queries: Int64
    keys: Int64


@dataclass(frozen=True, eq=False)
class AmongSelected(GroupedWork):
    """The work of one call; `lanes`: the head groups of its selection."""

    lanes: Sequence[GatheredHeads]
    rest: GatheredRelation
    scale: float

    def groups(self, q: Tensor, k: Tensor, inputs: Sequence[Tensor], *, backward: bool) -> Iterator[ItemGroup]:
        """Yield the head groups with their tokens."""
        for lane in self.lanes:
            batches, items = slice(lane.batch, lane.batch + 1), self._items(lane, q.dtype)
            queries, keys = torch.from_numpy(lane.queries), torch.from_numpy(lane.keys)
            yield ItemGroup(batches, lane.heads, lane.kv_heads, items, queries, keys)

    def _items(self, lane: GatheredHeads, dtype: torch.dtype) -> Iterator[Step]:
        for block in self.rest.blocks(lane.queries, lane.keys):
            item = WorkItem((TokenSlice(block.rows),) * 5, (TokenSlice(block.keys),) * 2)
            seen = None if block.full else self.rest.seen(lane.queries[block.rows], lane.keys[block.keys])
            yield item, EVERYTHING if seen is None else kernel_mask(torch.from_numpy(~seen), dtype)
