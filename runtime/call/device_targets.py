"""The compilation target of a device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

from attnc.compiler.kernels.targets import TARGETS, Target
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.target_names import find_target
from attnc.runtime.process.environment import is_interpreted

_PRETENDED: ContextVar[Target | None] = ContextVar("target that is pretended", default=None)


@contextmanager
def pretending(target: Target) -> Iterator[None]:
    """Make every device report this target inside the block: for kernels that are compiled and not run."""
    token = _PRETENDED.set(target)
    try:
        yield
    finally:
        _PRETENDED.reset(token)


def pretended() -> Target | None:
    """Return the target that every device reports inside `pretending`; None outside."""
    return _PRETENDED.get()


def _is_rocm() -> bool:
    return bool(getattr(torch.version, "hip", None))


def target_of(device: torch.device) -> Target:
    """Return the target that kernels for a device are compiled for; the interpreter uses sm_90.

    Raises UnsupportedError.
    """
    pretended = _PRETENDED.get()
    if pretended is not None:
        return pretended
    if device.type == "cpu" and is_interpreted():
        return TARGETS["sm_90"]
    if device.type != "cuda":
        raise UnsupportedError(
            f'backend="triton" on {device}: kernels run on CUDA and ROCm devices, or on the CPU in Triton\'s '
            f"interpreter (TRITON_INTERPRET=1)"
        )
    return _cuda_target(torch.cuda.current_device() if str(device) == "cuda" else device.index)


def named_target(name: str | None) -> Target:
    """Return a target by name; None: the target of the current GPU, or sm_90 without one. Raises ArgumentError."""
    if name is None:
        return TARGETS["sm_90"] if not torch.cuda.is_available() else _cuda_target(torch.cuda.current_device())
    return find_target(name)


def device_at_hand() -> torch.device | None:
    """Return the device that kernels run on here: a GPU, or the CPU in Triton's interpreter; else None."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu") if is_interpreted() else None


@cache
def _cuda_target(index: int) -> Target:
    if _is_rocm():
        return TARGETS["gfx942"]
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise UnsupportedError(f"device cuda:{index} has compute capability {major}.{minor}: kernels need 8.0 or newer")
    return TARGETS["sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"]


def check_triton() -> None:
    """Check that Triton is installed; raises UnsupportedError."""
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError("backend=\"triton\": Triton is not installed; pip install 'attnc[gpu]' (Linux)")
