"""Calls of tuned patterns, and the record of the tuned choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnc.runtime.api.attention import Attention
from attnc.runtime.choices.records import KIND, Record, read_record
from attnc.runtime.disk.store import store

TIME = "60s"
"""A time limit far above what the maximum of twenty-five rounds takes."""


def vectors(n: int = 300, heads: int = 2, *, gradients: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, n, 16, generator=draw).requires_grad_(gradients) for _ in range(3))
    return q, k, v


def record_of(attend: Attention, **options: Any) -> Record:
    (entry,) = store().entries()
    assert entry.kind == KIND
    assert entry.payload is not None
    record = read_record(entry.payload)
    assert record is not None
    return record
