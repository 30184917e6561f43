"""A step limit for aggregates: counts and bounds the loop steps of one plan, or of one evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.ir.nodes import Index, Position, Reduce, Var
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

MOST_STEPS = 1 << 29
"""Maximum number of steps that the aggregates of one plan take: seconds of work. A step is one operation in one trip of
a loop for one pair of a row and a key."""

TRIP_STEPS = 1 << 14
"""Steps to charge for a trip of a loop besides its lanes: the time that numpy takes to start its operations."""

EXACT_STEPS = 32
"""Steps to charge for an operation on Python integers."""

SHORT_BODY = 8
"""Number of operations of a body that are charged as one step."""


ALONE_STEPS = 1 << 10
"""Steps per lane that an aggregate may take when it is evaluated outside of a plan, such as for a mask in a call."""


class TooManyStepsError(EvaluationError):
    """Aggregates would take more steps than are allowed."""

    def __init__(self, message: str, span: Span | None) -> None:
        self.message = message
        super().__init__("A908", message, span, "make the range shorter, or write the result as a formula")

    def at(self, span: Span | None) -> TooManyStepsError:
        """Return this error at `span`, the position of an enclosing aggregate, if it has no position yet."""
        return self if self.span is not None or span is None else TooManyStepsError(self.message, span)


class _Work:
    """The number of steps taken so far, and their limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.steps = 0


_WORK: ContextVar[_Work | None] = ContextVar("_WORK", default=None)


@contextmanager
def counted(limit: int | None = None) -> Iterator[None]:
    """Count all steps inside the context together, up to `limit`; the default is MOST_STEPS."""
    token = _WORK.set(_Work(MOST_STEPS if limit is None else limit))
    try:
        yield
    finally:
        _WORK.reset(token)


def spend(node: Reduce, trips: int, lanes: int, origins: Mapping[Index, Span], *, wide: bool) -> None:
    """Charge the steps of an aggregate before it is evaluated. Raises EvaluationError above the limit."""
    work = _WORK.get() or _Work(max(MOST_STEPS, ALONE_STEPS * lanes))
    cost = (lanes * EXACT_STEPS if wide else lanes) * max(len(node.below) // SHORT_BODY, 1)
    steps = trips * (cost + TRIP_STEPS)
    work.steps += steps
    if work.steps > work.limit:
        raise TooManyStepsError(
            f"`{node.op}` with `for` takes more than {work.limit:,} steps: {trips:,} values for every query and key "
            f"that it depends on",
            origins.get(node),
        )


def lanes_read(
    node: Reduce, places: Mapping[str, NDArray[Any]], variables: Mapping[Var, NDArray[Any]]
) -> tuple[int, ...]:
    """The broadcast shape of the values that an aggregate reads: 1 along every axis on which it does not depend."""
    rank = max(x.ndim for x in (*places.values(), *variables.values()))
    arrays: list[NDArray[Any]] = []
    for below in node.below:
        if isinstance(below, Position):
            arrays.append(places[below.name])
        elif isinstance(below, Var) and below in variables and below is not node.var:
            arrays.append(variables[below])
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    return (1,) * (rank - len(shape)) + shape


def narrowed(active: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Reduce the active lanes to a shape: an axis where the shape is 1 becomes one lane, active if any lane is."""
    padded = (1,) * (active.ndim - len(shape)) + shape
    axes = tuple(i for i, length in enumerate(padded[-active.ndim :]) if length == 1 and active.shape[i] > 1)
    return np.asarray(active.any(axis=axes, keepdims=True)) if axes else active
