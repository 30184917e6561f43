"""Uninitialised memory filled with NaN or the largest integer, so that a read of it is always wrong, not by chance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill all memory that torch leaves unset (`empty`, `empty_like`, `new_empty`, `empty_strided`), here and inside
    torch's own operators."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is True by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
