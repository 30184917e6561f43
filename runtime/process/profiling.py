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
    """Check whether a torch profiler is running."""
    return torch._C._autograd._profiler_enabled()


def profiled(name: str, what: str = "") -> AbstractContextManager[object]:
    """Return a context that adds a row `attnc::NAME` or `attnc::NAME.WHAT` to a running profiler."""
    if is_dynamo_compiling() or not is_profiling():  # in a graph, operators add the rows
        return _NOTHING
    return record_function(f"attnc::{name}.{what}" if what else f"attnc::{name}")


_RUNNING: ContextVar[str] = ContextVar("the pattern whose call runs", default="")


class NamedCall:
    """A context in which a pattern's call runs: autograd nodes recorded in it keep the pattern's name."""

    __slots__ = ("_name", "_token")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._token: Token[str] = _RUNNING.set(self._name)

    def __exit__(self, *error: object) -> None:
        _RUNNING.reset(self._token)


def keep_name(ctx: Any) -> None:
    """Save the name of the running pattern for the row of the backward pass."""
    ctx.pattern = _RUNNING.get()


def backward_row(ctx: Any) -> AbstractContextManager[object]:
    """Return a context with a row `attnc::NAME.backward`, or none where no profiler runs or an operator has the row."""
    name: str = ctx.pattern
    return profiled(name, "backward") if name else _NOTHING
