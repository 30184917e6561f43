"""Rows of torch's profiler that carry the name of a pattern."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.compiler import is_dynamo_compiling
from torch.profiler import record_function

_NOTHING: AbstractContextManager[object] = nullcontext()


def is_profiling() -> bool:
    """Whether a profiler of torch runs."""
    return torch._C._autograd._profiler_enabled()


def profiled(name: str, what: str = "") -> AbstractContextManager[object]:
    """A row `attnc::NAME` or `attnc::NAME.WHAT` of a profiler that runs; nothing where none runs."""
    if is_dynamo_compiling() or not is_profiling():  # a graph has its rows from its operators
        return _NOTHING
    return record_function(f"attnc::{name}.{what}" if what else f"attnc::{name}")
