"""Attention to chosen places: for each place the queries that chose it are gathered, and meet its keys together.

A query's parts are merged by log-sum-exp in the order of its own places, and no row of a kernel call depends on the
number of rows beside it (`FILLED`): what other queries choose changes no bit of it. The backward takes the places one
by one, so that the gradients of their keys are sums over one call each: nothing is added from several sides at once.
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
from attnc.runtime.cpu import cpu_executor, flash_kernel
from attnc.runtime.cpu.autograd import Pair, Triple

MOST_MASKS = 64
"""Masks of partly visible places that are kept during a call."""


@dataclass(frozen=True, eq=False)
class SelectedBlocks:
    """The work of one call; the input of `forward` and `backward` is what was chosen, ([batch,] [heads,] rows, places).

    `by_batch`, `by_heads`: whether it has batch entries and heads.
    """

    places: BlockKeys
    scale: float
    by_batch: bool = True
    by_heads: bool = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """(out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv)."""
        (chosen,) = inputs
        width, wide = max(q.shape[-1], v.shape[-1]), v.shape[-1]
        sums = flash_kernel.lse_dtype(q.dtype)
        out = torch.zeros((*q.shape[:3], wide), dtype=sums)
        lse = torch.full(q.shape[:3], -math.inf, dtype=sums)
        q, k, v = (flash_kernel.padded(self._in_order(x, i), width) for i, x in enumerate((q, k, v)))
        for lane in self._lanes(q, k, chosen):
            own, keys, values = q[lane.batch, lane.heads], k[lane.batch, lane.kv_heads], v[lane.batch, lane.kv_heads]
            total, log = out[lane.batch, lane.heads], lse[lane.batch, lane.heads]
            totals, logs = (_by_rows(x) for x in (total, log))
            for some in lane.gathered:
                self._add(some, own, keys, values, totals, logs)
            if len(total) > 1:
                total.copy_(totals.transpose(0, 1))
                log.copy_(logs.t())
        return out.to(q.dtype), lse

    def _add(self, some: BlockQueries, own: Tensor, keys: Tensor, values: Tensor, total: Tensor, log: Tensor) -> None:
        """Merge what a place gives `own` (heads, rows, d) into `total` and `log` (rows, heads, …)."""
        parts = some.parts(len(own))
        rows, count, at = _filled(some.rows, parts), len(some.rows), some.keys
        of_rows, of_keys, of_values = _of_heads(own, rows)[None], keys[None, :, at], values[None, :, at]
        mask = some.mask(own.dtype, len(rows))
        o, part = flash_kernel.attend_in_parts(of_rows, of_keys, of_values, mask, some.causal, self.scale, parts)
        o, part, blind = o[0].transpose(0, 1), part[0].t(), some.blind
        if o.shape[-1] > total.shape[-1]:
            o = o[..., : total.shape[-1]]
        if blind is not None:
            part[:count].masked_fill_(blind[:, None], -math.inf)
            o[:count].masked_fill_(blind[:, None, None], 0)
        before, known = total.index_select(0, rows), log.index_select(0, rows)
        cpu_executor.merge(o, part, before, known)
        if count < len(rows):
            before, known, rows = before[:count], known[:count], some.rows
        total.index_copy_(0, rows, before)
        log.index_copy_(0, rows, known)

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """(dq, dk, dv)."""
        q, k, v, out, lse, chosen = kept
        sums, shapes, dtype = flash_kernel.lse_dtype(q.dtype), [x.shape for x in (q, k, v)], q.dtype
        lse, grad_out, grad_lse = flash_kernel.without_blind_rows(lse, grad_out, grad_lse)
        k, v = self._in_order(k, 1), self._in_order(v, 2)
        if grad_lse is not None:
            grad_out, q, k, v, out = flash_kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
        width = max(q.shape[-1], v.shape[-1])
        grad_out, q, k, v, out = (flash_kernel.padded(x, width) for x in (grad_out, q, k, v, out))
        grad_q, grad_k, grad_v = (torch.zeros(s, dtype=sums) for s in shapes)
        for lane in self._lanes(q, k, chosen):
            of_rows = [_by_rows(x[lane.batch, lane.heads]) for x in (grad_out, q, out)]
            of_keys = [x[lane.batch, lane.kv_heads] for x in (k, v)]
            log, to_rows = lse[lane.batch, lane.heads], grad_q[lane.batch, lane.heads]
            logs, rows_to = _by_rows(log), _by_rows(to_rows)
            to_keys, to_values = grad_k[lane.batch, lane.kv_heads], grad_v[lane.batch, lane.kv_heads]
            for some in lane.gathered:
                at, count, parts = some.keys, len(some.rows), some.parts(len(log))
                rows = _filled(some.rows, parts) if parts > 1 else some.rows
                do, own, o = (x.index_select(0, rows).transpose(0, 1)[None] for x in of_rows)
                keys, values = (x[None, :, at] for x in of_keys)
                known = logs.index_select(0, rows).t()[None]
                known = known if some.taken is None else known.masked_fill(~some.taken, math.inf)
                known[..., count:] = math.inf
                mask = some.mask(dtype, len(rows))
                dq, dk, dv = flash_kernel.backward_in_parts(
                    do, own, keys, values, o, known, mask, some.causal, self.scale, parts
                )
                rows_to.index_add_(0, some.rows, dq[0, :, :count, : shapes[0][-1]].transpose(0, 1).to(sums))
                to_keys[:, at] += dk[0, :, :, : shapes[1][-1]]
                to_values[:, at] += dv[0, :, :, : shapes[2][-1]]
            if len(to_rows) > 1:
                to_rows.copy_(rows_to.transpose(0, 1))
        grad_k, grad_v = self._as_given(grad_k), self._as_given(grad_v)
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)

    def _in_order(self, x: Tensor, number: int) -> Tensor:
        """Keys or values with those of a place side by side."""
        order = self.places.order
        return x if order is None or number == 0 else x.index_select(2, torch.from_numpy(order))

    def _as_given(self, x: Tensor) -> Tensor:
        """Gradients of those at their own positions."""
        order = self.places.order
        return x if order is None else torch.empty_like(x).index_copy_(2, torch.from_numpy(order), x)

    def _lanes(self, q: Tensor, k: Tensor, chosen: Tensor) -> Iterator[HeadGroup]:
        """The heads of a batch entry that choose alike, with what they gather."""
        heads, kv_heads = q.shape[1], k.shape[1]
        if not (q.numel() and k.shape[2]):
            return
        masks = _Masks(self.places)
        for batch in range(q.shape[0]):
            own = chosen[batch] if self.by_batch else chosen
            own = own if self.by_heads else own[None]
            count = own.shape[0]
            for i in range(count):
                per, per_kv = heads // count, max(kv_heads // count, 1)
                kv = i * kv_heads // count
                yield HeadGroup(
                    batch,
                    slice(i * per, (i + 1) * per),
                    slice(kv, kv + per_kv),
                    gathered(self.places, own[i], q.shape[2], masks),
                )


@dataclass(frozen=True, eq=False)
class BlockQueries:
    """Queries that meet the keys of one place: all of them, up to the diagonal (`causal`), or those that are `seen`.

    `taken`: which of the rows chose the place, None for all.
    """

    rows: Tensor
    keys: slice
    causal: bool = False
    seen: Tensor | None = None
    taken: Tensor | None = None

    def mask(self, dtype: torch.dtype, rows: int) -> Tensor | None:
        """What is added to the scores of so many rows, the last ones being there to fill up; None for nothing."""
        if self.seen is None:
            return None
        mask = torch.zeros((rows, self.seen.shape[1]), dtype=dtype)
        mask[: len(self.seen)].masked_fill_(~self.seen, -math.inf)
        return mask

    def parts(self, lanes: int) -> int:
        """Parts that the rows are cut into, so that every thread has as many; 1 where they do not see alike."""
        alike = not self.causal and self.seen is None
        return parts_of(lanes, len(self.rows), torch.get_num_threads()) if alike else 1

    @property
    def blind(self) -> Tensor | None:
        """Which rows get nothing here; None for none of them."""
        sees_none = None if self.seen is None else ~self.seen.any(-1)
        if self.taken is None:
            return sees_none
        return ~self.taken if sees_none is None else sees_none | ~self.taken


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads of a batch entry that choose alike, and their key heads."""

    batch: int
    heads: slice
    kv_heads: slice
    gathered: Iterator[BlockQueries]


def gathered(places: BlockKeys, chosen: Tensor, n_q: int, masks: _Masks) -> Iterator[BlockQueries]:
    """Place by place, the queries that chose it: those that see all of its keys, then those that see some.

    Which rows are computed in which way depends on nothing that other rows chose.
    """
    own = chosen if places.row_of is None else chosen.index_select(0, torch.from_numpy(places.row_of))
    starts = torch.from_numpy(places.starts)
    if places.states is None:
        full, part = own, None
    elif places.diagonal is not None and places.order is None:
        last = torch.arange(n_q)[:, None] + places.diagonal
        full, part = own & (last >= starts[None, 1:]), own & (last >= starts[None, :-1]) & (last < starts[None, 1:])
    else:
        states = torch.from_numpy(places.states).repeat_interleave(TILE, 0)[:n_q]
        full, part = own & (states == 1), own & (states == 0)
    found = by_place(full)
    partly = None if part is None else by_place(part)
    for i in range(len(places.starts) - 1):
        start, stop = int(places.starts[i]), int(places.starts[i + 1])
        if start == stop:
            continue
        rows = found.of(i)
        if len(rows):
            yield BlockQueries(rows, slice(start, stop))
        rows = rows[:0] if partly is None else partly.of(i)
        if len(rows):
            yield _on_diagonal(places, rows, start, stop, n_q) or masks.of(rows, start, stop)


def _on_diagonal(places: BlockKeys, rows: Tensor, start: int, stop: int, n_q: int) -> BlockQueries | None:
    """The rows of a place's own keys as one triangle, whichever of them chose it; None where there is none."""
    if places.diagonal is None or places.order is not None or start < places.diagonal:
        return None
    first = start - places.diagonal
    whole = torch.arange(first, min(stop - places.diagonal, n_q))
    taken = (
        None if len(rows) == len(whole) else torch.zeros(len(whole), dtype=torch.bool).index_fill_(0, rows - first, 1)
    )
    return BlockQueries(whole, slice(start, start + len(whole)), causal=True, taken=taken)


@dataclass(frozen=True)
class ByBlock:
    """Rows, place by place; those of place i are from `ends[i]` to `ends[i + 1]`."""

    rows: Tensor
    ends: list[int]

    def of(self, place: int) -> Tensor:
        """The rows of a place."""
        return self.rows[self.ends[place] : self.ends[place + 1]]


def by_place(chosen: Tensor) -> ByBlock:
    """The rows that chose each place."""
    pairs = chosen.t().contiguous().nonzero()
    counts = torch.bincount(pairs[:, 0], minlength=chosen.shape[1])
    return ByBlock(pairs[:, 1].contiguous(), [0, *torch.cumsum(counts, 0).tolist()])


class _Masks:
    """Masks of a call: heads that choose alike in a place share one."""

    def __init__(self, places: BlockKeys) -> None:
        self._places = places
        self._known: dict[tuple[int, bytes], Tensor] = {}

    def of(self, rows: Tensor, start: int, stop: int) -> BlockQueries:
        """Rows that see some of the keys of a place."""
        numbers = rows.numpy()
        name = (start, numbers.tobytes())
        if name not in self._known:
            if len(self._known) >= MOST_MASKS:
                self._known.clear()
            self._known[name] = self._seen(numbers, start, stop)
        return BlockQueries(rows, slice(start, stop), seen=self._known[name])

    def _seen(self, rows: NDArray[np.int64], start: int, stop: int) -> Tensor:
        places = self._places
        keys = np.arange(start, stop) if places.order is None else places.order[start:stop]
        alive = np.ones((len(rows), len(keys)), dtype=np.bool_)
        wide = not fits_word(places.rest, (0, int(rows[-1]) + 1), (0, int(keys.max()) + 1))
        return torch.from_numpy(exact_evaluation.mask_at(places.rest, rows, keys, alive, {}, wide=wide))


def _by_rows(x: Tensor) -> Tensor:
    """(rows, heads, …) of (heads, rows, …), in this order in memory: what is gathered of a row stands together."""
    return x.transpose(0, 1).contiguous()


def _of_heads(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of (heads, rows, d), as one matrix: there they are copied in whole lines, by all threads."""
    if len(x) == 1 or not x.is_contiguous():
        return x.index_select(1, rows)
    first = torch.arange(len(x))[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first + rows).flatten()).reshape(len(x), len(rows), -1)


def _filled(rows: Tensor, parts: int = 1) -> Tensor:
    """The rows, the last one as often as it takes for a multiple of `FILLED` in each part."""
    missing = -len(rows) % (FILLED * parts)
    return torch.cat([rows, rows[-1:].expand(missing)]) if missing else rows
