"""Rows of torch's profiler that carry the name of a pattern."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

_NOTHING: AbstractContextManager[object] = nullcontext()


def is_profiling() -> bool:
    """Whether a profiler of torch runs."""
    return torch._C._autograd._profiler_enabled()


def profiled(name: str, what: str = "") -> AbstractContextManager[object]:
    """A row `attnc::NAME` or `attnc::NAME.WHAT` of a profiler that runs; nothing where none runs."""
    if not is_profiling():
        return _NOTHING
    return record_function(f"attnc::{name}.{what}" if what else f"attnc::{name}")
