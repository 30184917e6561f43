"""Locks that survive fork: the child has no thread that could release a lock held by another thread."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from threading import RLock
from typing import Any


def fork_safe_lock(in_child: Callable[[], None] = lambda: None) -> Any:
    """Return a reentrant lock that the forking thread holds during a fork, so that the guarded data is consistent.

    The lock is reentrant because finalizers and signal handlers run anywhere. Hold it for a few operations only, never
    while computing something. `in_child` runs in the child process, under the lock.
    """
    lock = RLock()

    def release() -> None:
        in_child()
        lock.release()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=release)
    return lock


class LongLock:
    """A reentrant lock that may be held for seconds: a fork does not wait for it, and a child gets a fresh lock."""

    def __init__(self) -> None:
        self._lock = RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock inside the context."""
        lock = self._lock  # a child that forks inside the context replaces `self._lock`
        with lock:
            yield


def _renew_properties() -> None:
    """Give the cached properties of attnc new locks in a child, because a thread of the parent may have held one.

    Before Python 3.12 each cached property has a lock, held while a value is computed; values are stored when complete.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "attnc" or module is None:
            continue
        for kind in [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == name]:
            for cached in [x for x in vars(kind).values() if isinstance(x, cached_property)]:
                vars(cached)["lock"] = RLock()


if hasattr(os, "register_at_fork") and sys.version_info < (3, 12):
    os.register_at_fork(after_in_child=_renew_properties)
