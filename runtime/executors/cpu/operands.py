"""Operands as the cpu kernel takes them; copies are noted."""

from __future__ import annotations

from torch import Tensor

from attnc.runtime.executors.cpu import flash_kernel
from attnc.runtime.fallbacks import COPY, note


def operand(pattern: str, name: str, x: Tensor, width: int) -> Tensor:
    """Return `kernel.padded` of `x`; `pattern` and `name` identify it in the note."""
    fitted = flash_kernel.padded(x, width)
    if fitted is not x:
        how = "narrower than the others" if x.shape[-1] < width else "not contiguous"
        note(pattern, COPY, f"{name}: its rows are {how}")
    return fitted


def operands(pattern: str, q: Tensor, k: Tensor, v: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v padded to `width`."""
    return operand(pattern, "q", q, width), operand(pattern, "k", k, width), operand(pattern, "v", v, width)
