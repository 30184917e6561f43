"""What torch may have wrapped around the tensors of a call: autocast is obeyed, function transforms are refused."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.runtime.errors import UnsupportedError


def cast_for_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype where it is on, as scaled_dot_product_attention has it (fp64 is left alone)."""
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(q), cast(k), cast(v)


def refuse_transforms(*tensors: Tensor) -> None:
    """Raise UnsupportedError for `vmap` and forward-mode tensors: only the reference executor differentiates those."""
    functorch = torch._C._functorch
    for tensor in tensors:
        if functorch.is_batchedtensor(tensor):
            raise UnsupportedError(
                'vmap over attention is not supported: use the batch dimension, or backend="reference"'
            )
        if _has_tangent(tensor):
            raise UnsupportedError('forward-mode differentiation is not supported: use backend="reference"')


def _has_tangent(tensor: Tensor) -> bool:
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]  # torch has no types here
