"""What torch may have wrapped around the tensors of a call: autocast is obeyed, function transforms are refused."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.runtime.errors import UnsupportedError


def cast_for_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype where it is on, as scaled_dot_product_attention has it (fp64 is left alone)."""
    if not isinstance(q, Tensor) or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return tuple(  # type: ignore[return-value]  # three in, three out
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (q, k, v)
    )


def refuse_transforms(*tensors: Tensor) -> None:
    """Raise UnsupportedError for `vmap` and forward-mode tensors: only the reference executor differentiates those."""
    functorch = torch._C._functorch
    for tensor in tensors:
        if functorch.is_batchedtensor(tensor):
            raise UnsupportedError('vmap over attention is not supported: use the batch dimension, or backend="reference"')
        if torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise UnsupportedError('forward-mode differentiation is not supported: use backend="reference"')
