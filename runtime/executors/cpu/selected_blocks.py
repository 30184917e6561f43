"""Attention to selected blocks: each block gathers the queries that select it and attends for them together.

A query's partial results are merged by log-sum-exp in the order of its own blocks, and no row of a kernel call depends
on the number of other rows (`FILLED`): selections of other queries change no bit of its output. The backward takes
blocks one by one, so the gradients of a block's keys are sums over one call each, without concurrent adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.planning.selected_keys import FILLED, BlockKeys, parts_of
from attnc.compiler.planning.selected_keys import ROWS as TILE
from attnc.runtime.executors.cpu.work_items import (
    CAUSAL,
    EVERYTHING,
    GroupedWork,
    ItemGroup,
    KernelMask,
    Step,
    TokenSlice,
    WorkItem,
)

MOST_MASKS = 64
"""Maximum number of masks of partly visible blocks to cache during a call."""


@dataclass(frozen=True, eq=False)
class SelectedBlocks(GroupedWork):
    """The work of one call; its input is the selection, ([batch,] [heads,] rows, blocks).

    `by_batch`, `by_heads`: whether the selection has batch entries and heads.
    """

    places: BlockKeys
    scale: float
    by_batch: bool = True
    by_heads: bool = True

    def groups(self, q: Tensor, k: Tensor, inputs: Sequence[Tensor], *, backward: bool) -> Iterator[ItemGroup]:
        """Yield the head groups of the call with the queries that each block gathers."""
        (selection,) = inputs
        heads, kv_heads = q.shape[1], k.shape[1]
        if not (q.numel() and k.shape[2]):
            return
        masks = _Masks(self.places)
        order = None if self.places.order is None else torch.from_numpy(self.places.order)
        for batch in range(q.shape[0]):
            selected = selection[batch] if self.by_batch else selection
            selected = selected if self.by_heads else selected[None]
            count = selected.shape[0]
            for i in range(count):
                per, per_kv = heads // count, max(kv_heads // count, 1)
                kv = i * kv_heads // count
                blocks = gathered(self.places, selected[i], q.shape[2], masks)
                items = (block.item(per, q.dtype, backward=backward) for block in blocks)
                head_range, kv_range = slice(i * per, (i + 1) * per), slice(kv, kv + per_kv)
                yield ItemGroup(slice(batch, batch + 1), head_range, kv_range, items, keys=order, by_rows=True)


@dataclass(frozen=True, eq=False)
class GatheredRows:
    """Rows by number, the first `count` of them distinct, the others padding.

    `hidden`: for the LSE in a backward, the rows that contribute nothing.
    """

    tokens: Tensor
    count: int
    hidden: Tensor | None = None

    def at(self, x: Tensor) -> Tensor:
        """Return the rows of (1, heads, tokens, …) as a copy."""
        by_rows = x[0].transpose(0, 1)
        if by_rows.is_contiguous():  # the data of a row lies together
            return by_rows.index_select(0, self.tokens).transpose(0, 1)[None]
        return _of_heads(x[0], self.tokens)[None]

    def rows(self, x: Tensor) -> Tensor:
        """Return the rows; the LSE of rows that contribute nothing is +inf."""
        return self.at(x) if self.hidden is None else self.at(x).masked_fill_(self.hidden, math.inf)

    def like(self, rows: Tensor) -> Tensor:
        """Return the kernel's rows."""
        return rows

    def put(self, x: Tensor, tokens: Tensor) -> None:
        """Store the rows."""
        distinct = tokens[0, :, : self.count].transpose(0, 1)
        x[0].transpose(0, 1).index_copy_(0, self.tokens[: self.count], distinct)

    def add(self, x: Tensor, tokens: Tensor) -> None:
        """Add values to the rows."""
        distinct = tokens[0, :, : self.count].transpose(0, 1)
        x[0].transpose(0, 1).index_add_(0, self.tokens[: self.count], distinct.to(x.dtype))


@dataclass(frozen=True, eq=False)
class BlockQueries:
    """Queries that attend to one block: to all of its keys, up to the diagonal (`causal`), or to the `seen` pairs.

    `taken`: the rows that selected the block, None for all.
    """

    rows: Tensor
    keys: slice
    causal: bool = False
    seen: Tensor | None = None
    taken: Tensor | None = None

    def item(self, head_count: int, dtype: torch.dtype, *, backward: bool) -> Step:
        """Return the queries of `head_count` heads and their block as a work item with its mask.

        The rows of a forward are padded, so that no bit of a row depends on the number of the others.
        """
        same_keys = not self.causal and self.seen is None
        parts = parts_of(head_count, len(self.rows), torch.get_num_threads()) if same_keys else 1
        tokens = self.rows if backward and parts == 1 else _filled(self.rows, parts)
        count = len(self.rows)
        padding, keys = len(tokens) - count, TokenSlice(self.keys)
        if self.taken is None and self.seen is None and not (backward and padding):
            rows = GatheredRows(tokens, count)
            return WorkItem((rows,) * 5, (keys, keys), parts=parts), CAUSAL if self.causal else EVERYTHING
        takes = F.pad(torch.ones(count, dtype=torch.bool) if self.taken is None else self.taken, (0, padding))
        hidden = None if self.taken is None and not padding else ~takes
        visible = KernelMask(None, None if self.taken is None else hidden, causal=self.causal)
        if self.seen is not None:
            seen = F.pad(self.seen, (0, 0, 0, padding), value=True)
            additive = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
            visible = visible._replace(additive=additive, blind=~(takes & seen.any(-1)))
        rows = GatheredRows(tokens, count)
        queries = rows, rows, GatheredRows(tokens, count, hidden), rows, rows
        return WorkItem(queries, (keys, keys), parts=parts), visible


def gathered(blocks: BlockKeys, selection: Tensor, n_q: int, masks: _Masks) -> Iterator[BlockQueries]:
    """Yield, block by block, the selecting queries: first those that see all of its keys, then those that see some.

    How a row is computed does not depend on the selections of other rows.
    """
    selected = selection if blocks.row_of is None else selection.index_select(0, torch.from_numpy(blocks.row_of))
    starts = torch.from_numpy(blocks.starts)
    if blocks.states is None:
        full, part = selected, None
    elif blocks.diagonal is not None and blocks.order is None:
        last = torch.arange(n_q)[:, None] + blocks.diagonal
        full, part = (
            selected & (last >= starts[None, 1:]),
            selected & (last >= starts[None, :-1]) & (last < starts[None, 1:]),
        )
    else:
        states = torch.from_numpy(blocks.states).repeat_interleave(TILE, 0)[:n_q]
        full, part = selected & (states == 1), selected & (states == 0)
    full_rows = by_place(full)
    partly = None if part is None else by_place(part)
    for i in range(len(blocks.starts) - 1):
        start, stop = int(blocks.starts[i]), int(blocks.starts[i + 1])
        if start == stop:
            continue
        rows = full_rows.of(i)
        if len(rows):
            yield BlockQueries(rows, slice(start, stop))
        rows = rows[:0] if partly is None else partly.of(i)
        if len(rows):
            yield _on_diagonal(blocks, rows, start, stop, n_q) or masks.of(rows, start, stop)


def _on_diagonal(blocks: BlockKeys, rows: Tensor, start: int, stop: int, n_q: int) -> BlockQueries | None:
    """Return the rows of a block's own keys as one triangle, including rows that did not select it; else None."""
    if blocks.diagonal is None or blocks.order is not None or start < blocks.diagonal:
        return None
    first = start - blocks.diagonal
    triangle = torch.arange(first, min(stop - blocks.diagonal, n_q))
    taken = (
        None
        if len(rows) == len(triangle)
        else torch.zeros(len(triangle), dtype=torch.bool).index_fill_(0, rows - first, 1)
    )
    return BlockQueries(triangle, slice(start, start + len(triangle)), causal=True, taken=taken)


@dataclass(frozen=True)
class ByBlock:
    """Rows, block by block; the rows of block i are from `ends[i]` to `ends[i + 1]`."""

    rows: Tensor
    ends: list[int]

    def of(self, place: int) -> Tensor:
        """Return the rows of a block."""
        return self.rows[self.ends[place] : self.ends[place + 1]]


def by_place(selection: Tensor) -> ByBlock:
    """Group the rows by the blocks that they selected."""
    pairs = selection.t().contiguous().nonzero()
    counts = torch.bincount(pairs[:, 0], minlength=selection.shape[1])
    return ByBlock(pairs[:, 1].contiguous(), [0, *torch.cumsum(counts, 0).tolist()])


class _Masks:
    """The masks of a call, shared by heads with equal selections of a block."""

    def __init__(self, blocks: BlockKeys) -> None:
        self._places = blocks
        self._known: dict[tuple[int, bytes], Tensor] = {}

    def of(self, rows: Tensor, start: int, stop: int) -> BlockQueries:
        """Return rows that see some of the keys of a block."""
        numbers = rows.numpy()
        name = (start, numbers.tobytes())
        if name not in self._known:
            if len(self._known) >= MOST_MASKS:
                self._known.clear()
            self._known[name] = self._seen(numbers, start, stop)
        return BlockQueries(rows, slice(start, stop), seen=self._known[name])

    def _seen(self, rows: NDArray[np.int64], start: int, stop: int) -> Tensor:
        blocks = self._places
        keys = np.arange(start, stop) if blocks.order is None else blocks.order[start:stop]
        active = np.ones((len(rows), len(keys)), dtype=np.bool_)
        wide = not fits_word(blocks.rest, (0, int(rows[-1]) + 1), (0, int(keys.max()) + 1))
        return torch.from_numpy(exact_evaluation.mask_at(blocks.rest, rows, keys, active, {}, wide=wide))


def _of_heads(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows of (heads, rows, d), gathered as one matrix: torch then copies whole lines with all threads."""
    if len(x) == 1 or not x.is_contiguous():
        return x.index_select(1, rows)
    first = torch.arange(len(x))[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first + rows).flatten()).reshape(len(x), len(rows), -1)


def _filled(rows: Tensor, parts: int = 1) -> Tensor:
    """Pad the rows by repeating the last row to a multiple of `FILLED` in each part."""
    missing = -len(rows) % (FILLED * parts)
    return torch.cat([rows, rows[-1:].expand(missing)]) if missing else rows
