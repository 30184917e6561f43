"""Flux Attention's streaming layers, written from their definition."""

from __future__ import annotations

from torch import Tensor

from reference.attention import positions
from reference.routing import Result, softmax_over


def flux(q: Tensor, k: Tensor, v: Tensor, *, full: Tensor, sinks: int, window: int, block: int) -> Result:
    """Causal; a request in `full` (B) sees all earlier keys, another request the blocks of the sink and the window."""
    query, key = positions(q, k)
    near = (key // block < sinks // block) | (query // block - key // block < window // block)
    return softmax_over(q, k, v, (key <= query) & (full[:, None, None, None] | near))
