"""Detection of tensors in the order (batch, tokens, heads, head dimension), with heads behind tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.runtime.process.warned import LayoutWarning, warn

MANY_HEADS = 256
"""More heads than models have: a larger dimension before fewer tokens holds tokens."""


def check_layout(q: Tensor, k: Tensor) -> None:
    """Warn with LayoutWarning about tensors that look like (batch, tokens, heads, head dimension)."""
    (_, heads, n_q, _), (_, kv_heads, n_k, _) = q.shape, k.shape
    if torch.compiler.is_compiling() or not all(type(size) is int for size in (heads, n_q, kv_heads, n_k)):
        return  # a comparison of symbolic sizes would guard the graph
    if heads <= n_q:
        return
    grouped = n_q > n_k > 0 and n_q % n_k == 0 and heads == kv_heads
    if grouped or (heads > MANY_HEADS and kv_heads > MANY_HEADS and kv_heads > n_k):
        warn(f"q has {heads} heads (dimension 1) and {n_q} tokens (dimension 2){layout_remedy(q, k)}", LayoutWarning)


def layout_remedy(q: Tensor, k: Tensor) -> str:
    """Return advice for tensors in the order of flash-attention; empty where they cannot be in that order."""
    if q.shape[1] <= q.shape[2] or not k.shape[2] or q.shape[2] % k.shape[2]:
        return ""
    return (
        "; if the tensors are (batch, tokens, heads, head dimension), transpose them: `q.transpose(1, 2)`, as attnc "
        "takes (batch, heads, tokens, head dimension)"
    )
