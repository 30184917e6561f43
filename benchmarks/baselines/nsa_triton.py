"""NSA-Triton (XunhaoLai/native-sparse-attention-triton): attention to given blocks of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baselines.rival import Absent, Attend, imported, version

NAME = "NSA-Triton"
MODULE = "native_sparse_attention.ops.triton.topk_sparse_attention"


def available() -> str | None:
    """Return the version."""
    return version(MODULE, "native-sparse-attention-triton", "native_sparse_attention")


def attend(chosen: Tensor, block: int, device: str) -> Attend | Absent:
    """Return causal attention to the blocks of `chosen`, (kv heads, tokens, topk), ascending, −1 for none; batch 1."""
    module: Any = imported(MODULE)
    if module is None:
        return Absent("NSA-Triton is not installed")
    if device != "cuda":
        return Absent("NSA-Triton has no kernel on a CPU")
    ends = torch.tensor([0, chosen.shape[1]], dtype=torch.int32, device=chosen.device)
    places = chosen.to(torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        out: Tensor = module.topk_sparse_attention(q, k, v, places, block, ends)
        return out.transpose(0, 1)[None]

    return run


def places(taken: Tensor, topk: int) -> Tensor:
    """Return the indices (…, topk) of the blocks in `taken` (…, blocks), ascending, then −1; at most `topk` a row."""
    blocks = taken.shape[-1]
    each = torch.arange(blocks, device=taken.device).expand_as(taken).masked_fill(~taken, blocks)
    indices = each.sort(dim=-1).values[..., :topk]
    indices = indices.masked_fill(indices == blocks, -1)
    return torch.nn.functional.pad(indices, (0, max(topk - blocks, 0)), value=-1)
