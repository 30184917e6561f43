"""Arrays that a call computes on the host, as tensors on its device: copied once while recently used.

So a repeated call copies nothing, and can be captured in a CUDA graph. Tensors that a graph has read are kept forever,
because every replay of the graph reads them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.runtime.process.recent import Recent
from attnc.runtime.settings import SETTINGS

_KNOWN: Recent[Tensor] = Recent(128, SETTINGS.table_bytes, lambda tensor: tensor.untyped_storage().nbytes())
_CAPTURED: dict[int, Tensor] = {}


def on_device(array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return an array as a tensor on a device, which no code may modify."""
    contiguous = np.ascontiguousarray(array)
    contiguous = contiguous if contiguous.flags.writeable else contiguous.copy()
    tensor = torch.from_numpy(contiguous) if dtype is None else torch.from_numpy(contiguous).to(dtype)
    if device.type == "cpu":
        return tensor
    content = hashlib.blake2b(contiguous.tobytes(), digest_size=16).digest()
    key = (contiguous.shape, contiguous.dtype.str, dtype, device, content)
    cached = _KNOWN.get(key, lambda: tensor.to(device))
    keep_captured([cached])
    return cached


def keep_captured(tensors: Iterable[Tensor]) -> None:
    """Keep tensors alive that a CUDA graph under capture reads."""
    for tensor in tensors:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            _CAPTURED[id(tensor)] = tensor
