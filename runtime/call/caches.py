"""Caches of keys and values: which slot holds which token, and reads of tokens. No other slots are read.

A cache is k (B, Hkv, S, dk) and v (B, Hkv, S, dv), token t in slot t; as a ring, token t from `first` on is in slot
`first + (t - first) % (S - first)`. With a block table it is k (pages, Hkv, page, dk) and v (pages, Hkv, page, dv),
token t of batch entry b in slot `t % page` of page `block_table[b, t

page]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.process.device_constants import on_device

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cache:
    """The cached tokens of a batch: `lengths` per entry; `table` int (B, columns) of pages; `ring`: first ring token.

    `entries`: the index of each batch entry in k and v, or in the table.
    """

    k: Tensor
    v: Tensor
    lengths: tuple[int, ...]
    entries: tuple[int, ...]
    table: Int64 | None = None
    ring: int | None = None

    def of(self, batch_entries: Sequence[int]) -> Cache:
        """Return the cache of some batch entries."""
        lengths, entries = (tuple(x[i] for i in batch_entries) for x in (self.lengths, self.entries))
        return replace(self, lengths=lengths, entries=entries)

    @property
    def kv_heads(self) -> int:
        """The number of kv heads."""
        return self.k.shape[1]

    @property
    def slots(self) -> int:
        """The number of slots of a batch entry, or of a page."""
        return self.k.shape[2]

    def view(self, batches: Sequence[int], tokens: slice) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of tokens as a view (b, Hkv, tokens, d); None where pages or the ring split them."""
        if self.table is not None or (self.ring is not None and tokens.stop > self.slots):
            return None
        entries = self._places(batches)
        if not isinstance(entries, slice):
            return None
        return self.k[entries, :, tokens], self.v[entries, :, tokens]

    def gathered(self, batches: Sequence[int], tokens: Int64) -> tuple[Tensor, Tensor]:
        """Return copies of keys and values of tokens: (b, Hkv, tokens, d)."""
        if self.table is not None:
            rows = self.table[[self.entries[i] for i in batches]]
            pages, at = (on_device(x, self.k.device) for x in (rows[:, tokens // self.slots], tokens % self.slots))
            return self.k[pages, :, at].transpose(1, 2), self.v[pages, :, at].transpose(1, 2)
        slots, entries = on_device(self._slots(tokens), self.k.device), self._places(batches)
        if isinstance(entries, slice):
            return self.k[entries].index_select(2, slots), self.v[entries].index_select(2, slots)
        at = torch.tensor(entries, device=self.k.device)[:, None]
        return self.k[at, :, slots].transpose(1, 2), self.v[at, :, slots].transpose(1, 2)

    def placeholders(self, length: int) -> tuple[Tensor, Tensor]:
        """Return zeros shaped like all tokens of all entries, without memory of their own."""
        shape = len(self.lengths), self.kv_heads, length
        k, v = (x.new_zeros(()).expand(*shape, x.shape[3]) for x in (self.k, self.v))
        return k, v

    def _places(self, batches: Sequence[int]) -> slice | list[int]:
        places = [self.entries[i] for i in batches]
        first, last = places[0], places[-1]
        return slice(first, last + 1) if places == list(range(first, last + 1)) else places

    def _slots(self, tokens: Int64) -> Int64:
        if self.ring is None:
            return tokens
        turning = self.ring + (tokens - self.ring) % max(self.slots - self.ring, 1)
        return np.where(tokens < self.ring, tokens, turning)

    def whole(self, batches: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """Return all tokens of batch entries of one length; tokens that a ring has overwritten are zeros."""
        view = self.view(batches, slice(0, length))
        if view is not None:
            return view
        if self.ring is None:
            return self.gathered(batches, np.arange(length))
        held = np.arange(max(length - (self.slots - self.ring), self.ring), length)
        held = np.concatenate([np.arange(min(self.ring, length)), held])
        result = []
        for x in self.gathered(batches, held):
            padded = x.new_zeros((*x.shape[:2], length, x.shape[3]))
            padded[:, :, on_device(held, x.device)] = x
            result.append(padded)
        return result[0], result[1]


def read_cache(q: Tensor, k: Tensor, v: Tensor, kv_len: object, block_table: object, *, ring: bool) -> Cache:
    """Return the checked cache of a call. Raises ArgumentError, ArgumentTypeError."""
    check_cache(q, k, v, paged=block_table is not None)
    table = None if block_table is None else read_table(block_table, q.shape[0])
    lengths = read_lengths(kv_len, q.shape[0])
    check_lengths(lengths, q.shape[2], k.shape[2], None if table is None else table.shape[1], ring=ring)
    if table is not None:
        for i, length in enumerate(lengths):
            _check_pages(table[i], length, k.shape[2], k.shape[0], i)
    return Cache(k, v, lengths, tuple(range(q.shape[0])), table)


def check_cache(q: object, k: object, v: object, *, paged: bool) -> None:
    """Raise ArgumentError, ArgumentTypeError for shapes that do not match."""
    for name, x in (("q", q), ("k_cache", k), ("v_cache", v)):
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(f"{name} is {type(x).__name__}: it must be a torch tensor")
        if x.dim() != 4:
            raise ArgumentError(f"{name} has {x.dim()} dimensions, shape {tuple(x.shape)}: it must have 4")
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    if k.shape[:3] != v.shape[:3]:
        raise ArgumentError(
            f"k_cache and v_cache disagree: shapes {tuple(k.shape)} and {tuple(v.shape)}; all but the last dimension "
            f"must be equal"
        )
    if not paged and k.shape[0] != q.shape[0]:
        raise ArgumentError(
            f"q has batch {q.shape[0]} and k_cache {k.shape[0]} (dimension 0): they must be equal without a block_table"
        )


def check_lengths(lengths: Sequence[int], n_q: int, slots: int, columns: int | None, *, ring: bool) -> None:
    """Raise ArgumentError for lengths that exceed the cache; `columns`: the columns of its table, if it has one."""
    for i, length in enumerate(lengths):
        if length < n_q:
            raise ArgumentError(
                f"kv_len of batch entry {i} is {length} and q has {n_q} tokens (dimension 2): kv_len counts the tokens "
                f"of q too, whose keys and values must be in the cache"
            )
        if columns is not None:
            needed = -(-length // max(slots, 1))
            if columns < needed:
                raise ArgumentError(
                    f"block_table has {columns} columns and batch entry {i} needs {needed} pages of {slots} tokens for "
                    f"kv_len {length}"
                )
        elif not ring and length > slots:
            raise ArgumentError(
                f"kv_len of batch entry {i} is {length} and the cache has {slots} slots (dimension 2): pass ring=True "
                f"if token t is in slot t % {slots}"
            )


def read_lengths(kv_len: object, batch: int) -> tuple[int, ...]:
    """Return one length per batch entry. Raises ArgumentError, ArgumentTypeError."""
    if isinstance(kv_len, Tensor):
        if kv_len.dtype not in INTEGERS:
            raise ArgumentTypeError(f"kv_len has dtype {kv_len.dtype}: it must be integers")
        kv_len = kv_len.tolist() if kv_len.dim() else [int(kv_len)] * batch
    entries: list[object] = list(kv_len) if isinstance(kv_len, list | tuple) else [kv_len] * batch
    if len(entries) != batch:
        raise ArgumentError(
            f"kv_len has {len(entries)} entries and q has batch {batch}: pass a number, or one per entry"
        )
    lengths = []
    for length in entries:
        if isinstance(length, bool) or not isinstance(length, int):
            raise ArgumentTypeError(f"kv_len is {length!r}: it must be an integer, or one per batch entry")
        lengths.append(length)
    return tuple(lengths)


INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def read_table(block_table: object, batch: int) -> Int64:
    """Return the pages of each batch entry. Raises ArgumentError, ArgumentTypeError."""
    table = block_table if isinstance(block_table, Tensor) else torch.as_tensor(block_table)
    check_table(table, batch)
    pages: Int64 = table.detach().cpu().numpy().astype(np.int64)
    return pages


def check_table(table: Tensor, batch: int) -> None:
    """Raise ArgumentError, ArgumentTypeError for a table with a wrong shape or dtype."""
    if table.dtype not in INTEGERS:
        raise ArgumentTypeError(f"block_table has dtype {table.dtype}: it must be integers")
    if table.dim() != 2 or table.shape[0] != batch:
        raise ArgumentError(
            f"block_table has shape {tuple(table.shape)}: it must be (batch, pages of an entry), and batch is {batch}"
        )


def _check_pages(pages: Int64, length: int, size: int, count: int, entry: int) -> None:
    needed = -(-length // max(size, 1))
    wrong = (pages[:needed] < 0) | (pages[:needed] >= count)
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ArgumentError(f"block_table[{entry}, {at}] is {pages[at]}: k_cache has {count} pages (dimension 0)")
