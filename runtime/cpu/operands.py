"""Tensors as the kernel under the cpu executor takes them; what is copied for it is noted."""

from __future__ import annotations

from torch import Tensor

from attnc.runtime.cpu import flash_kernel
from attnc.runtime.fallbacks import COPY, note


def operand(pattern: str, name: str, x: Tensor, width: int) -> Tensor:
    """`kernel.padded`; `pattern` and `name` say what it is."""
    found = flash_kernel.padded(x, width)
    if found is not x:
        how = "narrower than the others" if x.shape[-1] < width else "not in one piece in memory"
        note(pattern, COPY, f"{name}: its rows are {how}")
    return found


def operands(pattern: str, q: Tensor, k: Tensor, v: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of q, k and v."""
    return operand(pattern, "q", q, width), operand(pattern, "k", k, width), operand(pattern, "v", v, width)
