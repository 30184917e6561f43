"""A key/value cache as kernels read it: lengths and block table may stay on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.runtime.call.caches import (
    INTEGERS,
    Cache,
    check_cache,
    check_lengths,
    check_table,
    read_cache,
    read_lengths,
    read_table,
)
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError


@dataclass(frozen=True, eq=False)
class DeviceCache:
    """A cache with `lengths` int32 (B,), `table` int32 (B, columns) of pages, `ring`: its first token; see `Cache`.

    `known_lengths`: the lengths, if the caller passed them on the host.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    table: Tensor | None = None
    ring: int | None = None
    known_lengths: tuple[int, ...] | None = None

    @property
    def kv_heads(self) -> int:
        """Number of kv heads."""
        return self.k.shape[1]

    @property
    def slots(self) -> int:
        """Number of slots of a batch entry, or of a page."""
        return self.k.shape[2]

    @property
    def capacity(self) -> int:
        """Maximum number of tokens of a batch entry."""
        return self.slots if self.table is None else self.slots * self.table.shape[1]

    def placeholders(self, length: int) -> tuple[Tensor, Tensor]:
        """Return zeros with the shape of `length` tokens of all entries, without allocating them."""
        shape = len(self.lengths), self.kv_heads, length
        k, v = (x.new_zeros(()).expand(*shape, x.shape[3]) for x in (self.k, self.v))
        return k, v

    def known(self) -> Cache:
        """Return the cache with lengths on the host; waits for the device. The table is not read."""
        lengths = tuple(self.lengths.tolist()) if self.known_lengths is None else self.known_lengths
        return Cache(self.k, self.v, lengths, tuple(range(len(lengths))), None, self.ring)


def read_device_cache(
    q: Tensor, k: Tensor, v: Tensor, kv_len: object, block_table: object, *, ring: int | None
) -> DeviceCache:
    """Return the cache of a call. Values on the device are not checked: lengths and pages must be valid.

    Raises ArgumentError, ArgumentTypeError, UnsupportedError.
    """
    check_cache(q, k, v, paged=block_table is not None)
    batch, device = len(q), q.device
    table = block_table if isinstance(block_table, Tensor) and block_table.is_cuda else None
    pages: Tensor | None = None
    if table is not None:
        check_table(table, batch)
        pages = table
    elif block_table is not None:
        pages = torch.from_numpy(read_table(block_table, batch))
    host_lengths: tuple[int, ...] | None = None
    if isinstance(kv_len, Tensor) and kv_len.is_cuda:
        if kv_len.dtype not in INTEGERS or tuple(kv_len.shape) != (batch,):
            raise ArgumentError(f"kv_len is {kv_len.dtype} {tuple(kv_len.shape)}: it must be integers, ({batch},)")
        lengths = kv_len
    else:
        if table is None:
            host_lengths = read_cache(q, k, v, kv_len, block_table, ring=ring is not None).lengths
        else:
            host_lengths = read_lengths(kv_len, batch)
            check_lengths(host_lengths, q.shape[2], k.shape[2], table.shape[1], ring=ring is not None)
        lengths = torch.tensor(host_lengths, dtype=torch.int32)
    if pages is not None and k.shape[2] & (k.shape[2] - 1):
        raise UnsupportedError(
            f"pages of {k.shape[2]} tokens are not supported by kernels: the page size must be a power of two"
        )
    device_pages = None if pages is None else pages.to(device, torch.int32).contiguous()
    return DeviceCache(k, v, lengths.to(device, torch.int32).contiguous(), device_pages, ring, host_lengths)
