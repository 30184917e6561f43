"""FlashInfer: decoding against pages of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baselines.rival import Absent, Attend, imported, version

NAME = "FlashInfer"
PAGE = 16
WORKSPACE = 128 << 20
"""Bytes of workspace for its planner."""


def available() -> str | None:
    """Return the version."""
    return version("flashinfer", "flashinfer-python", "flashinfer")


def decode(q: Tensor, k: Tensor, lengths: Tensor) -> Attend | Absent:
    """Return a step of q (batch, heads, 1, width) on caches (batch, kv heads, slots, width), planned before timing.

    The number of slots is a multiple of `PAGE`. Keys and values are laid out as pages once, and the call reads these
    pages: it must get the same caches every time.
    """
    module: Any = imported("flashinfer")
    if module is None:
        return Absent("FlashInfer is not installed")
    batch, heads, _, width = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    used = (lengths + PAGE - 1) // PAGE
    first = torch.zeros(batch + 1, dtype=torch.int32, device=q.device)
    first[1:] = used.cumsum(0)
    every = torch.arange(batch * (slots // PAGE), dtype=torch.int32, device=q.device).reshape(batch, -1)
    indices = torch.cat([row[: int(count)] for row, count in zip(every, used.tolist(), strict=True)])
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device), "HND", use_tensor_cores=heads // kv_heads >= 4
    )
    last = ((lengths - 1) % PAGE + 1).to(torch.int32)
    types = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    wrapper.plan(first, indices, last, heads, kv_heads, width, PAGE, pos_encoding_mode="NONE", **types)
    made: list[tuple[Tensor, Tensor]] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not made:
            made.append((pages(k), pages(v)))
        out: Tensor = wrapper.run(q[:, :, 0], made[0])
        return out[:, :, None]

    return run


def pages(x: Tensor, page: int = PAGE) -> Tensor:
    """Lay out slots (batch, kv heads, slots, width) as consecutive pages: (batch · pages, kv heads, page, width)."""
    batch, heads, slots, width = x.shape
    apart = x.reshape(batch, heads, slots // page, page, width).transpose(1, 2)
    return apart.reshape(-1, heads, page, width).contiguous()
