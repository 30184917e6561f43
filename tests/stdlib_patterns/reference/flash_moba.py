"""FlashMoBA, written from its definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from reference.routing import Result, moba


def mixed_keys(k: Tensor, filter: Tensor) -> Tensor:
    """Add to keys the SiLU of a causal convolution by channel; filter (Hkv, width, dk), the key's own entry first."""
    heads, width, channels = filter.shape
    lanes = k.transpose(2, 3).reshape(k.shape[0], heads * channels, k.shape[2])
    taps = filter.flip(1).transpose(1, 2).reshape(heads * channels, 1, width)
    mixed = functional.conv1d(functional.pad(lanes, (width - 1, 0)), taps, groups=heads * channels)
    return k + functional.silu(mixed).reshape(k.shape[0], heads, channels, -1).transpose(2, 3)


def flash_moba(q: Tensor, k: Tensor, v: Tensor, *, filter: Tensor, block: int, topk: int) -> Result:
    """Xiao et al. 2025: MoBA on the mixed keys."""
    return moba(q, mixed_keys(k, filter), v, block=block, topk=topk)
