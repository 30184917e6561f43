"""Caches of executors for the calls of one pattern: bounded, thread-safe, by shape and by the data that is read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import record_function

from attnc.compiler.ir import Pattern
from attnc.compiler.ir.value_nodes import values_of
from attnc.compiler.planning.build_plan import CallShape
from attnc.compiler.planning.cache_need import CacheNeed, cache_need
from attnc.runtime.call.tensor_checks import (
    ids_of_documents,
    names_read,
)
from attnc.runtime.planning.call_relations import documents_of_call, relations_of
from attnc.runtime.process.recent import Recent, held_bytes
from attnc.runtime.settings import SETTINGS

if TYPE_CHECKING:
    from attnc.runtime.choices.tuned import Tuned

__all__ = ["PLANNING", "Planner", "cache_of", "documents_of_call", "name_of", "need_of", "planning"]
__all__ += ["relations_of", "runs_in"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

PLANNING = "attnc::plan"
"""The name of planning in a profiler."""


def planning() -> AbstractContextManager[object]:
    """Return a context that shows planning to a profiler, but not to a trace, in which plans are no operations."""
    return nullcontext() if torch._C._is_tracing() else record_function(PLANNING)


_SHORT = 256
"""Input data of up to this many bytes is its own cache key."""


class InputKeys:
    """Cache keys of a pattern's inputs: of the data that the relation reads, of the shapes of other inputs."""

    def __init__(self, pattern: Pattern) -> None:
        read, ids = names_read(pattern), ids_of_documents(pattern)
        self._named = [
            (tensor.name, runs_in if tensor.name == ids else _contents if tensor.name in read else None)
            for tensor in pattern.tensors
        ]

    def of_shape(self, shape: CallShape) -> list[Hashable]:
        """Return a key of the data that the relation reads, and of the sizes that inputs decide."""
        data = [key(shape.inputs[name]) for name, key in self._named if key is not None]
        return [*data, tuple(sorted(shape.sizes.items()))]

    def of_tensors(self, inputs: Sequence[Tensor]) -> list[Hashable]:
        """Return a key of each input, in the order of the pattern."""
        return [_key_by(x, key) for x, (_, key) in zip(inputs, self._named, strict=False)]


class Planner:
    """A pattern, whose `identity` is `text`, with what executors keep for its calls.

    `strict`: raise UnsupportedError where no tile plan exists. `tuned`: the choices made by measurement; None: the cost
    model decides everything. `knob`: the name of this attention's choice among them.
    """

    def __init__(self, text: str, pattern: Pattern, strict: bool, tuned: Tuned | None = None, knob: str = "") -> None:
        self.text = text
        self.pattern = pattern
        self.strict = strict
        self.tuned = tuned
        self.knob = knob
        self._parts: dict[object, object] = {}
        self._kept: Recent[Any] = Recent(SETTINGS.plans, SETTINGS.plan_bytes, held_bytes)
        self.input_keys = InputKeys(pattern)

    def part(self, make: Callable[[Planner], T]) -> T:
        """Return what an executor keeps for this pattern: the result of `make(self)`, made once.

        The result must not refer to this planner: a planner and its plans are dropped with the last reference to it.
        """
        part = self._parts.get(make)
        return cast("T", self._parts.setdefault(make, make(self)) if part is None else part)

    def kept(self, name: Hashable, shape: CallShape, make: Callable[[], T]) -> T:
        """Return the cached object of this name for inputs like these, made by `make` on a miss."""
        return cast("T", self._kept.get((name, *self.input_keys.of_shape(shape)), make))

    def remembered(self, name: Hashable, make: Callable[[], T]) -> T:
        """Return the cached object of this name, whatever the call, made by `make` on a miss."""
        return cast("T", self._kept.get(name, make))


def cache_of(pattern: Pattern, heads: int, kv_heads: int) -> Callable[[], CacheNeed | None]:
    """Return a function that finds the cache need on its first call."""
    return partial(need_of, pattern, heads, max(heads // max(kv_heads, 1), 1))


def need_of(pattern: Pattern, heads: int, group: int) -> CacheNeed | None:
    """Return `cache_need`, computed once per key."""
    nodes = tuple((node.visible, node.keys, node.family, *values_of(node)) for node in pattern.nodes)
    key = (nodes, pattern.combine, pattern.lse, pattern.documents, pattern.segments, pattern.head_lists, heads, group)
    return _NEEDS.get(key, lambda: cache_need(pattern, heads, group))


_NEEDS: Recent[CacheNeed | None] = Recent(SETTINGS.specs)


def name_of(tensor: Tensor, is_read: bool) -> Hashable:
    """Return a cache key of an input: its data where the relation reads it, else its shape."""
    return _key_by(tensor, _contents if is_read else None)


def _key_by(tensor: Tensor, name: Callable[[NDArray[Any]], Hashable] | None) -> Hashable:
    return (tensor.shape, tensor.dtype) if name is None else name(tensor.detach().cpu().numpy())


def runs_in(ids: NDArray[Any]) -> Hashable:
    """Return a key of the documents in an array of ids: the starts of runs of equal ids, and ids that come back.

    It takes a byte for each token, and no copy of the ids.
    """
    if ids.nbytes <= _SHORT or not ids.size:
        return ids.shape, ids.dtype, ids.tobytes()
    rows = np.atleast_2d(ids)
    row, before = np.nonzero(rows[:, 1:] != rows[:, :-1])
    at = np.append(np.arange(len(rows)), row)
    first = np.append(rows[:, 0], rows[row, before + 1])
    order = np.lexsort((first, at))
    again = (np.diff(at[order]) == 0) & (first[order][1:] == first[order][:-1])
    distinguishing = (row, before, first) if again.any() else (row, before)
    return ids.shape, hashlib.sha256(b"".join(x.tobytes() for x in distinguishing)).digest()


def _contents(array: NDArray[np.generic]) -> Hashable:
    """Return a cache key of an array's data."""
    if array.nbytes <= _SHORT:
        return array.shape, array.dtype, array.tobytes()
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return array.shape, array.dtype, hashlib.sha256(data).digest()  # in hardware on most machines
