"""FlexAttention: compiled, with a block mask made before; and the making of the block mask alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from baselines.rival import Absent, Attend, Mask

NAME = "FlexAttention"
BLOCK = 128
TUNED = "max-autotune-no-cudagraphs"
"""The torch.compile mode that its authors recommend for speed; it measures its configurations first."""


def available() -> str | None:
    """Return torch's version."""
    return str(torch.__version__)


def block_mask(mask: Mask, device: str, *, compiled: bool = True, block: int = BLOCK) -> BlockMask | None:
    """Return the block mask, None if every pair is visible; the compiled function does not store n × n booleans."""
    if mask.mod is None:
        return None
    return maker(mask, device, compiled=compiled, block=block)()


def maker(mask: Mask, device: str, *, compiled: bool, block: int = BLOCK) -> Callable[[], BlockMask]:
    """Return the function that makes the block mask, for timing."""
    make: Any = torch.compile(create_block_mask, dynamic=False) if compiled else create_block_mask
    mod: Any = mask.mod
    n, heads = mask.n, mask.heads
    return lambda: make(mod, None, heads, n, n, device=device, BLOCK_SIZE=block)


def attend(mask: BlockMask | None, device: str, *, tuned: bool, compiled: bool = True) -> Attend:
    """Return attention compiled for fixed sizes; `tuned`: in mode `TUNED` on a GPU. A CPU has no gradient for it.

    Without `compiled` it computes dense masked scores, which is correct but slow.
    """
    more: dict[str, Any] = {"mode": TUNED} if tuned and device == "cuda" else {}
    function: Any = torch.compile(flex_attention, dynamic=False, **more) if compiled else flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if device == "cpu":
            q, k, v = q.detach(), k.detach(), v.detach()
        out: Tensor = function(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out

    return run


def trained(device: str) -> Absent | None:
    """Return None if it has a gradient, else the reason."""
    return Absent("FlexAttention has no gradient on a CPU") if device == "cpu" else None


def forget() -> None:
    """Reset the compiler: after a few patterns dynamo stops compiling and runs attention unfused."""
    torch.compiler.reset()
