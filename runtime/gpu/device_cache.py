"""A cache as kernels read it: its lengths and its table may stay on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.runtime.caches import Cache, read_cache
from attnc.runtime.errors import ArgumentError, ArgumentTypeError, UnsupportedError


@dataclass(frozen=True, eq=False)
class DeviceCache:
    """`lengths` int32 (B,), `table` int32 (B, columns) of pages, `ring`: its first token; see `Cache`."""

    k: Tensor
    v: Tensor
    lengths: Tensor
    table: Tensor | None = None
    ring: int | None = None

    @property
    def kv_heads(self) -> int:
        """Heads of keys."""
        return self.k.shape[1]

    @property
    def slots(self) -> int:
        """Slots of a batch entry, or of a page."""
        return self.k.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens of a batch entry at most."""
        return self.slots if self.table is None else self.slots * self.table.shape[1]

    def placeholders(self, length: int) -> tuple[Tensor, Tensor]:
        """Zeros like so many tokens of all entries, without memory of their own."""
        shape = len(self.lengths), self.kv_heads, length
        k, v = (x.new_zeros(()).expand(*shape, x.shape[3]) for x in (self.k, self.v))
        return k, v

    def known(self) -> Cache:
        """The same with lengths that the host knows; waits for the device. The table is not looked at."""
        lengths = tuple(self.lengths.tolist())
        return Cache(self.k, self.v, lengths, tuple(range(len(lengths))), None, self.ring)


def read_device_cache(
    q: Tensor, k: Tensor, v: Tensor, kv_len: object, block_table: object, *, ring: int | None
) -> DeviceCache:
    """The cache of a call. What is on the device is not looked at: lengths and pages must be right there.

    Raises ArgumentError, ArgumentTypeError, UnsupportedError.
    """
    given = kv_len if isinstance(kv_len, Tensor) and kv_len.is_cuda else None
    table = block_table if isinstance(block_table, Tensor) and block_table.is_cuda else None
    if given is None and (table is None or block_table is None):
        own = read_cache(q, k, v, kv_len, block_table, ring=ring is not None)
        kv_len = torch.tensor(own.lengths, dtype=torch.int32)
        block_table = None if own.table is None else torch.from_numpy(own.table)
    elif given is not None and (given.dim() != 1 or len(given) != len(q) or given.is_floating_point()):
        raise ArgumentError(f"kv_len has shape {tuple(given.shape)}: it must be integers (batch,), {len(q)}")
    if not isinstance(kv_len, Tensor):
        kv_len = torch.as_tensor(kv_len).expand(len(q))
    pages = None if block_table is None else torch.as_tensor(block_table).to(q.device, torch.int32).contiguous()
    cache = DeviceCache(k, v, kv_len.to(q.device, torch.int32).contiguous(), pages, ring)
    if pages is not None and k.shape[2] & (k.shape[2] - 1):
        raise UnsupportedError(f"pages of {k.shape[2]} tokens: kernels take pages of a power of two")
    _check_strides(k, v)
    return cache


def _check_strides(*tensors: Tensor) -> None:
    """Caches are not copied, so kernels must be able to address them: in units of 16 bytes."""
    for name, x in zip(("k_cache", "v_cache"), tensors, strict=True):
        size = x.element_size()
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ArgumentError(f"{name} has stride {x.stride(3)} in its last dimension: kernels need 1")
        if any(s * size % 16 for s, n in zip(x.stride()[:3], x.shape, strict=False) if n > 1) or x.data_ptr() % 16:
            raise ArgumentTypeError(
                f"{name} has strides {x.stride()} of {size} bytes: kernels need multiples of 16 bytes; allocate heads "
                f"of a multiple of {16 // size}"
            )
