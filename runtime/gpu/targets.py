"""The target of a device."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from attnc.compiler.kernels.targets import TARGETS, Target
from attnc.runtime.errors import UnsupportedError


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels, so that they run on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def target_of(device: torch.device) -> Target:
    """What kernels for a device are compiled for; in the interpreter as for sm_90.

    Raises UnsupportedError.
    """
    if device.type == "cpu" and is_interpreted():
        return TARGETS["sm_90"]
    if device.type != "cuda":
        raise UnsupportedError(
            f'backend="triton" on {device}: kernels run on CUDA and ROCm devices, or on the CPU in Triton\'s '
            f"interpreter (TRITON_INTERPRET=1)"
        )
    return _of_cuda(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _of_cuda(index: int) -> Target:
    if torch.version.hip is not None:
        return TARGETS["gfx942"]
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise UnsupportedError(f"device cuda:{index} has compute capability {major}.{minor}: kernels need 8.0 or newer")
    return TARGETS["sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"]


def check_triton() -> None:
    """Raise UnsupportedError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError("backend=\"triton\": Triton is not installed; pip install 'attnc[gpu]' (Linux)")
