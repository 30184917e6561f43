"""Arrays that a call computes on the host, as tensors where it runs: copied once, while among those used last.

So a call that has run before copies nothing, and can be captured in a CUDA graph. What a graph has read is kept for
good: it is read again whenever the graph is replayed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.runtime.recent import Recent
from attnc.runtime.settings import SETTINGS

_KNOWN: Recent[Tensor] = Recent(128, SETTINGS.table_bytes, lambda tensor: tensor.untyped_storage().nbytes())
_CAPTURED: dict[int, Tensor] = {}


def on_device(array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """An array as a tensor, which nobody may change."""
    whole = np.ascontiguousarray(array)
    whole = whole if whole.flags.writeable else whole.copy()
    found = torch.from_numpy(whole) if dtype is None else torch.from_numpy(whole).to(dtype)
    if device.type == "cpu":
        return found
    content = hashlib.blake2b(whole.tobytes(), digest_size=16).digest()
    key = (whole.shape, whole.dtype.str, dtype, device, content)
    known = _KNOWN.get(key, lambda: found.to(device))
    keep_captured([known])
    return known


def keep_captured(tensors: Iterable[Tensor]) -> None:
    """Keep what a CUDA graph reads that is being captured."""
    for tensor in tensors:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            _CAPTURED[id(tensor)] = tensor
