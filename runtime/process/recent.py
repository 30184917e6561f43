"""Bounded caches of values by key, safe across threads and forks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields, is_dataclass
from threading import Event, get_ident
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from attnc.compiler.ir import Node
from attnc.compiler.locks import fork_safe_lock
from attnc.compiler.planning.cpu_plan import Plan

T = TypeVar("T")


class _Making(NamedTuple):
    """A value that a thread is making; `done` is set when the value is stored, or could not be made."""

    thread: int
    done: Event


_MAKING: dict[tuple[int, Hashable], _Making] = {}
"""Values being made, by cache and key. Cleared in a forked child, which lacks the threads that make them."""

_LOCK = fork_safe_lock(_MAKING.clear)
"""One lock for all caches: it is held for a few hundred nanoseconds, and a fork waits for one lock only."""


class Recent(Generic[T]):
    """A cache of the `size` most recently used values, of at most `most` bytes in total by `weigh`, but at least one.

    A thread that requests a value that another thread is making waits for it: plans, programs and kernels cost more.
    """

    def __init__(self, size: int, max_weight: int | None = None, weigh: Callable[[T], int] = lambda value: 0) -> None:
        self._size = size
        self._max_weight = max_weight
        self._weigh = weigh
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._weights: dict[Hashable, int] = {}
        self.weight = 0
        """Total bytes of the stored values."""

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of `key`, made by `make` on a miss."""
        with _LOCK:
            try:
                self._values.move_to_end(key)
                return self._values[key]
            except KeyError:
                pass
        return self._missing(key, make)

    def __len__(self) -> int:
        return len(self._values)

    def _missing(self, key: Hashable, make: Callable[[], T]) -> T:
        """Make a missing value in one thread at a time."""
        while (other := self._other(key)) is not None:
            other.done.wait()
            with _LOCK:
                if key in self._values:
                    return self._values[key]
        try:
            value = make()
            self._keep(key, value)
        finally:
            with _LOCK:
                made = _MAKING.pop((id(self), key), None)
            if made is not None:
                made.done.set()
        return value

    def _other(self, key: Hashable) -> _Making | None:
        """Return the value as another thread makes it; None where this thread is to make it."""
        name = id(self), key
        with _LOCK:
            made = _MAKING.get(name)
            if made is not None and made.thread != get_ident():
                return made
            _MAKING[name] = _Making(get_ident(), Event()) if made is None else made
        return None

    def _keep(self, key: Hashable, value: T) -> None:
        weight = 0 if self._max_weight is None else self._weigh(value)
        dropped = []  # freed after the lock is released: freeing may take time, and run finalizers
        with _LOCK:
            self.weight += weight - self._weights.get(key, 0)
            dropped.append(self._values.pop(key, None))
            self._values[key] = value
            self._weights[key] = weight
            while len(self._values) > 1 and self._is_full():
                oldest, old = self._values.popitem(last=False)
                self.weight -= self._weights.pop(oldest)
                dropped.append(old)

    def _is_full(self) -> bool:
        return len(self._values) > self._size or (self._max_weight is not None and self.weight > self._max_weight)


def held_bytes(value: object) -> int:
    """Return the bytes of the arrays and tensors reachable through a value's fields and entries, each counted once."""
    total, seen, pending = 0, set[int](), [value]
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, Node):  # a relation's nodes share their operands, and hold no arrays
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            total += item.untyped_storage().nbytes()
        elif isinstance(item, np.ndarray | Plan):
            total += item.nbytes
        elif isinstance(item, Mapping):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
        elif is_dataclass(item) and not isinstance(item, type):
            pending += [getattr(item, entry.name) for entry in fields(item)]
    return total
