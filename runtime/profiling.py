"""Rows of torch's profiler that carry the name of a pattern."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

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


_RUNNING: ContextVar[str] = ContextVar("the pattern whose call runs", default="")


class NamedCall:
    """A context in which a pattern's call runs: what autograd records in it keeps the pattern's name."""

    __slots__ = ("_name", "_token")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._token: Token[str] = _RUNNING.set(self._name)

    def __exit__(self, *error: object) -> None:
        _RUNNING.reset(self._token)


def keep_name(ctx: Any) -> None:
    """Keep the name of the pattern whose call runs for the row of the backward pass."""
    ctx.pattern = _RUNNING.get()


def backward_row(ctx: Any) -> AbstractContextManager[object]:
    """A row `attnc::NAME.backward`; nothing where no profiler runs, or where an operator around it has the row."""
    name: str = ctx.pattern
    return profiled(name, "backward") if name else _NOTHING
