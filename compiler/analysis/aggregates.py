"""A step limit for aggregates: count the work of the loops of one plan, or of one evaluation, and bound it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.ir import Index, Position, Reduce, Var
from attnc.compiler.rewrite import walk
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

MOST_STEPS = 1 << 29
"""Steps that the aggregates of one plan may take, seconds of work. A step is one trip for one pair of a row and a key,
and one operation."""

TRIP_STEPS = 1 << 14
"""Steps that a trip of a loop costs beside its lanes: numpy takes about as long to start its operations."""

EXACT_STEPS = 32
"""Steps that an operation on Python integers costs."""

SHORT_BODY = 8
"""Operations of a body that one step stands for."""


ALONE_STEPS = 1 << 10
"""Steps for each lane that an aggregate may take which is evaluated alone, outside of a plan: a mask in a call."""


class TooManyStepsError(EvaluationError):
    """Aggregates would take more steps than are allowed."""

    def __init__(self, message: str, span: Span | None) -> None:
        self.message = message
        super().__init__("A908", message, span, "make the range shorter, or write the formula that it comes to")

    def at(self, span: Span | None) -> TooManyStepsError:
        """Return this error at `span`, the position of an enclosing aggregate, if it has no position yet."""
        return self if self.span is not None or span is None else TooManyStepsError(self.message, span)


class _Work:
    """Steps taken so far."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.steps = 0


_WORK: ContextVar[_Work | None] = ContextVar("_WORK", default=None)


@contextmanager
def counted(limit: int | None = None) -> Iterator[None]:
    """Count the steps of everything inside together, of which there may be `limit`, MOST_STEPS unless given."""
    token = _WORK.set(_Work(MOST_STEPS if limit is None else limit))
    try:
        yield
    finally:
        _WORK.reset(token)


def spend(node: Reduce, trips: int, lanes: int, origins: Mapping[Index, Span], *, wide: bool) -> None:
    """Count the steps of an aggregate before it takes them. Raises EvaluationError where they are too many."""
    work = _WORK.get() or _Work(max(MOST_STEPS, ALONE_STEPS * lanes))
    cost = (lanes * EXACT_STEPS if wide else lanes) * max(len(walk(node)) // SHORT_BODY, 1)
    steps = trips * (cost + TRIP_STEPS)
    work.steps += steps
    if work.steps > work.limit:
        raise TooManyStepsError(
            f"`{node.op}` with `for` takes more than {work.limit:,} steps: all {trips:,} values, for every query "
            f"and key that it depends on",
            origins.get(node),
        )


def lanes_read(
    node: Reduce, places: Mapping[str, NDArray[Any]], variables: Mapping[Var, NDArray[Any]]
) -> tuple[int, ...]:
    """The shape of what an aggregate reads: 1 along every axis along which its value does not differ."""
    rank = max(x.ndim for x in (*places.values(), *variables.values()))
    read: list[NDArray[Any]] = []
    for below in walk(node):
        if isinstance(below, Position):
            read.append(places[below.name])
        elif isinstance(below, Var) and below in variables and below is not node.var:
            read.append(variables[below])
    shape = np.broadcast_shapes(*(x.shape for x in read))
    return (1,) * (rank - len(shape)) + shape


def narrowed(alive: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The lanes that are asked for, one lane for all of an axis along which a shape is 1."""
    padded = (1,) * (alive.ndim - len(shape)) + shape
    axes = tuple(i for i, n in enumerate(padded[-alive.ndim :]) if n == 1 and alive.shape[i] > 1)
    return np.asarray(alive.any(axis=axes, keepdims=True)) if axes else alive
