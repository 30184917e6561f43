"""Inputs that only selections read: no gradient reaches them, because a selection is not differentiable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attnc.compiler.ir import Element, Index, Pattern, Recur, Value
from attnc.compiler.ir.value_nodes import values_of


def rank_only(pattern: Pattern) -> tuple[str, ...]:
    """Return the names of the real inputs that selections read, but no score, weight, value, state or `combine`."""
    ranked = _read(value for item in pattern.selections for value in (item.score, item.keep))
    if not ranked:
        return ()
    differentiable = _read(_differentiable_values(pattern))
    return tuple(t.name for t in pattern.tensors if t.name in ranked - differentiable and t.kind == "real")


def _differentiable_values(pattern: Pattern) -> Iterator[Value]:
    """Yield every value through which a gradient reaches an input."""
    for node in pattern.nodes:
        yield from values_of(node)
    yield from (value for value in (pattern.combine, pattern.lse) if value is not None)
    for recur in (*pattern.stateful, *((pattern.recur,) if pattern.recur is not None else ())):
        yield from _recurrence_values(recur)


def _recurrence_values(recur: Recur) -> Iterator[Value]:
    yield recur.read
    yield from (step.value for step in recur.steps)


def _read(roots: Iterable[Value | Index]) -> set[str]:
    return {below.tensor.name for root in roots for below in root.below if isinstance(below, Element)}
