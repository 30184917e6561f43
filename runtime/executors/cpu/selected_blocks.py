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

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.planning.selected_keys import FILLED, BlockKeys, parts_of
from attnc.compiler.planning.selected_keys import ROWS as TILE
from attnc.runtime.executors.cpu import cpu_executor, flash_kernel
from attnc.runtime.executors.cpu.autograd import Pair, Triple

MOST_MASKS = 64
"""Maximum number of masks of partly visible blocks to cache during a call."""


@dataclass(frozen=True, eq=False)
class SelectedBlocks:
    """The work of one call; `forward` and `backward` take the selection, ([batch,] [heads,] rows, blocks), as input.

    `by_batch`, `by_heads`: whether the selection has batch entries and heads.
    """

    places: BlockKeys
    scale: float
    by_batch: bool = True
    by_heads: bool = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """Compute (out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv)."""
        (selection,) = inputs
        width, wide = max(q.shape[-1], v.shape[-1]), v.shape[-1]
        sums = flash_kernel.lse_dtype(q.dtype)
        out = torch.zeros((*q.shape[:3], wide), dtype=sums)
        lse = torch.full(q.shape[:3], -math.inf, dtype=sums)
        q, k, v = (flash_kernel.padded(self._in_order(x, i), width) for i, x in enumerate((q, k, v)))
        for head_group in self._lanes(q, k, selection):
            group_queries, keys, values = (
                q[head_group.batch, head_group.heads],
                k[head_group.batch, head_group.kv_heads],
                v[head_group.batch, head_group.kv_heads],
            )
            total, log = out[head_group.batch, head_group.heads], lse[head_group.batch, head_group.heads]
            totals, logs = (_by_rows(x) for x in (total, log))
            for block_queries in head_group.gathered:
                self._add(block_queries, group_queries, keys, values, totals, logs)
            if len(total) > 1:
                total.copy_(totals.transpose(0, 1))
                log.copy_(logs.t())
        return out.to(q.dtype), lse

    def _add(
        self,
        block_queries: BlockQueries,
        group_queries: Tensor,
        keys: Tensor,
        values: Tensor,
        total: Tensor,
        log: Tensor,
    ) -> None:
        """Merge a block's partial results for `group_queries` (heads, rows, d) into `total`, `log` (rows, heads, …)."""
        parts = block_queries.parts(len(group_queries))
        rows, count, key_slice = _filled(block_queries.rows, parts), len(block_queries.rows), block_queries.keys
        of_rows, of_keys, of_values = (
            _of_heads(group_queries, rows)[None],
            keys[None, :, key_slice],
            values[None, :, key_slice],
        )
        mask = block_queries.mask(group_queries.dtype, len(rows))
        o, part = flash_kernel.attend_in_parts(
            of_rows, of_keys, of_values, mask, block_queries.causal, self.scale, parts
        )
        o, part, blind = o[0].transpose(0, 1), part[0].t(), block_queries.blind
        if o.shape[-1] > total.shape[-1]:
            o = o[..., : total.shape[-1]]
        if blind is not None:
            part[:count].masked_fill_(blind[:, None], -math.inf)
            o[:count].masked_fill_(blind[:, None, None], 0)
        old_out, old_lse = total.index_select(0, rows), log.index_select(0, rows)
        cpu_executor.merge(o, part, old_out, old_lse)
        if count < len(rows):
            old_out, old_lse, rows = old_out[:count], old_lse[:count], block_queries.rows
        total.index_copy_(0, rows, old_out)
        log.index_copy_(0, rows, old_lse)

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """Compute (dq, dk, dv)."""
        q, k, v, out, lse, selection = kept
        sums, shapes, dtype = flash_kernel.lse_dtype(q.dtype), [x.shape for x in (q, k, v)], q.dtype
        lse, grad_out, grad_lse = flash_kernel.without_blind_rows(lse, grad_out, grad_lse)
        k, v = self._in_order(k, 1), self._in_order(v, 2)
        if grad_lse is not None:
            grad_out, q, k, v, out = flash_kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
        width = max(q.shape[-1], v.shape[-1])
        grad_out, q, k, v, out = (flash_kernel.padded(x, width) for x in (grad_out, q, k, v, out))
        grad_q, grad_k, grad_v = (torch.zeros(s, dtype=sums) for s in shapes)
        for head_group in self._lanes(q, k, selection):
            of_rows = [_by_rows(x[head_group.batch, head_group.heads]) for x in (grad_out, q, out)]
            of_keys = [x[head_group.batch, head_group.kv_heads] for x in (k, v)]
            log, to_rows = lse[head_group.batch, head_group.heads], grad_q[head_group.batch, head_group.heads]
            logs, rows_to = _by_rows(log), _by_rows(to_rows)
            to_keys, to_values = (
                grad_k[head_group.batch, head_group.kv_heads],
                grad_v[head_group.batch, head_group.kv_heads],
            )
            for block_queries in head_group.gathered:
                key_slice, count, parts = block_queries.keys, len(block_queries.rows), block_queries.parts(len(log))
                rows = _filled(block_queries.rows, parts) if parts > 1 else block_queries.rows
                do, query_rows, o = (x.index_select(0, rows).transpose(0, 1)[None] for x in of_rows)
                keys, values = (x[None, :, key_slice] for x in of_keys)
                row_lse = logs.index_select(0, rows).t()[None]
                row_lse = (
                    row_lse if block_queries.taken is None else row_lse.masked_fill(~block_queries.taken, math.inf)
                )
                row_lse[..., count:] = math.inf
                mask = block_queries.mask(dtype, len(rows))
                dq, dk, dv = flash_kernel.backward_in_parts(
                    do, query_rows, keys, values, o, row_lse, mask, block_queries.causal, self.scale, parts
                )
                rows_to.index_add_(0, block_queries.rows, dq[0, :, :count, : shapes[0][-1]].transpose(0, 1).to(sums))
                to_keys[:, key_slice] += dk[0, :, :, : shapes[1][-1]]
                to_values[:, key_slice] += dv[0, :, :, : shapes[2][-1]]
            if len(to_rows) > 1:
                to_rows.copy_(rows_to.transpose(0, 1))
        grad_k, grad_v = self._as_given(grad_k), self._as_given(grad_v)
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)

    def _in_order(self, x: Tensor, number: int) -> Tensor:
        """Return keys or values, contiguous within a block; queries (`number` 0) unchanged."""
        order = self.places.order
        return x if order is None or number == 0 else x.index_select(2, torch.from_numpy(order))

    def _as_given(self, x: Tensor) -> Tensor:
        """Return gradients in the original order of positions."""
        order = self.places.order
        return x if order is None else torch.empty_like(x).index_copy_(2, torch.from_numpy(order), x)

    def _lanes(self, q: Tensor, k: Tensor, selection: Tensor) -> Iterator[HeadGroup]:
        """Yield the head groups of the call with the queries that they gather."""
        heads, kv_heads = q.shape[1], k.shape[1]
        if not (q.numel() and k.shape[2]):
            return
        masks = _Masks(self.places)
        for batch in range(q.shape[0]):
            selected = selection[batch] if self.by_batch else selection
            selected = selected if self.by_heads else selected[None]
            count = selected.shape[0]
            for i in range(count):
                per, per_kv = heads // count, max(kv_heads // count, 1)
                kv = i * kv_heads // count
                yield HeadGroup(
                    batch,
                    slice(i * per, (i + 1) * per),
                    slice(kv, kv + per_kv),
                    gathered(self.places, selected[i], q.shape[2], masks),
                )


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

    def mask(self, dtype: torch.dtype, rows: int) -> Tensor | None:
        """Return the additive mask of `rows` rows, the last ones being padding; None if nothing is masked."""
        if self.seen is None:
            return None
        mask = torch.zeros((rows, self.seen.shape[1]), dtype=dtype)
        mask[: len(self.seen)].masked_fill_(~self.seen, -math.inf)
        return mask

    def parts(self, head_count: int) -> int:
        """Return the number of parts of the rows, so that threads are balanced; 1 if rows see different keys."""
        same_keys = not self.causal and self.seen is None
        return parts_of(head_count, len(self.rows), torch.get_num_threads()) if same_keys else 1

    @property
    def blind(self) -> Tensor | None:
        """The rows that get nothing from the block; None if there are none."""
        sees_none = None if self.seen is None else ~self.seen.any(-1)
        if self.taken is None:
            return sees_none
        return ~self.taken if sees_none is None else sees_none | ~self.taken


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads of a batch entry that share a selection, and their kv heads."""

    batch: int
    heads: slice
    kv_heads: slice
    gathered: Iterator[BlockQueries]


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


def _by_rows(x: Tensor) -> Tensor:
    """Return (heads, rows, …) as contiguous (rows, heads, …), so that the data of a row is gathered together."""
    return x.transpose(0, 1).contiguous()


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
