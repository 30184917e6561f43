"""torch's scaled_dot_product_attention with one of its kernels: dense, full or causal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from baselines.rival import Absent, Attend

NAME = "SDPA"

KERNELS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HERE: Mapping[str, tuple[str, ...]] = {"cuda": tuple(KERNELS), "cpu": ("flash", "math")}
"""The kernels available on a device."""


def available() -> str | None:
    """Return torch's version."""
    return str(torch.__version__)


def attend(kernel: str, device: str, *, causal: bool) -> Attend | Absent:
    """Return attention by one kernel; query heads may share kv heads."""
    if kernel not in HERE[device]:
        return Absent(f"SDPA has no kernel {kernel} on {device}")
    backend = KERNELS[kernel]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return run
