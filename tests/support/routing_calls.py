"""Calls of the library's routing patterns, compared with their references."""

from __future__ import annotations

import torch
from torch import Tensor

from cases.routing import BY_INPUTS, HEADS, Inputs, Routed


def seen_by(case: Routed, qkv: list[Tensor], inputs: Inputs) -> Tensor:
    """Return the pattern's own masks, (B, Hq, Nq, Nk)."""
    attend = case.compiled()
    q, k, v = qkv
    content: Inputs = {"heads": HEADS} if case.name in BY_INPUTS else {"q": q, "k": k, "v": v}
    masks = [attend.mask(q.shape[2], k.shape[2], head=head, **content, **inputs) for head in range(q.shape[1])]
    return torch.stack(masks, 1)


def seen_as_in_reference(case: Routed, qkv: list[Tensor], inputs: Inputs) -> None:
    q, k, v = qkv
    seen, _ = case.reference(q, k, v, inputs)
    assert torch.equal(seen_by(case, qkv, inputs), seen)
