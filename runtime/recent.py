"""Bounded memories of values by key, safe across threads and forks."""

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
    """A value that a thread makes; `done` is set when it is kept, or when it could not be made."""

    thread: int
    done: Event


_MAKING: dict[tuple[int, Hashable], _Making] = {}
"""What is being made, by memory and key. In a child nothing is: the threads that made it are not there."""

_LOCK = fork_safe_lock(_MAKING.clear)
"""Of all memories: it is held for some hundred nanoseconds, so that one is enough, and a fork has one to wait for."""


class Recent(Generic[T]):
    """The `size` values asked for last, by key, of at most `most` bytes by `weigh` together, but for the last alone.

    Who asks for a value that another thread is making waits for it: plans, programs and kernels cost more than that.
    """

    def __init__(self, size: int, most: int | None = None, weigh: Callable[[T], int] = lambda value: 0) -> None:
        self._size = size
        self._most = most
        self._weigh = weigh
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._weights: dict[Hashable, int] = {}
        self.weight = 0
        """Bytes that are kept."""

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made now if it is not known."""
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
        """A value that was not there, made by one thread at a time."""
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
        """The other thread that makes the value; None where this one shall."""
        name = id(self), key
        with _LOCK:
            made = _MAKING.get(name)
            if made is not None and made.thread != get_ident():
                return made
            _MAKING[name] = _Making(get_ident(), Event()) if made is None else made
        return None

    def _keep(self, key: Hashable, value: T) -> None:
        weight = 0 if self._most is None else self._weigh(value)
        dropped = []  # let go when the lock is given back: that may take time, and run finalizers
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
        return len(self._values) > self._size or (self._most is not None and self.weight > self._most)


def held_bytes(value: object) -> int:
    """Bytes of the arrays and tensors in a value: in its fields, entries, and those of these; each is counted once."""
    total, seen, rest = 0, set[int](), [value]
    while rest:
        one = rest.pop()
        if id(one) in seen or isinstance(one, Node):  # a relation's nodes share their operands, and hold no arrays
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            total += one.untyped_storage().nbytes()
        elif isinstance(one, np.ndarray | Plan):
            total += one.nbytes
        elif isinstance(one, Mapping):
            rest += one.values()
        elif isinstance(one, list | tuple):
            rest += one
        elif is_dataclass(one) and not isinstance(one, type):
            rest += [getattr(one, item.name) for item in fields(one)]
    return total
