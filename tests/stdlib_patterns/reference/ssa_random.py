"""Stochastically subsampled attention, written from its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.attention import positions
from reference.routing import Result, softmax_over


def ssa_random(q: Tensor, k: Tensor, v: Tensor, *, place: Tensor, window: int) -> Result:
    """Hussain et al. 2023: keys are shuffled by `place` (B, Nk); a query sees itself and earlier keys of its window."""
    query, key = positions(q, k)
    shuffled = torch.zeros_like(place, dtype=torch.long)
    shuffled.scatter_(1, place.argsort(dim=1, stable=True), key.expand(place.shape))
    drawn = (shuffled // window)[:, None, None] == query // window
    return softmax_over(q, k, v, drawn & (key < query) | (key == query))
