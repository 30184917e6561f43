"""Locks that a fork leaves usable: a child has one thread, and nobody who would give back what others held."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from threading import RLock
from typing import Any


def fork_safe_lock(in_child: Callable[[], None] = lambda: None) -> Any:
    """A lock that whoever forks holds while it forks, so that nobody else does and what it guards is whole.

    It may be taken again by the thread that has it: finalizers and signal handlers run anywhere. Held for a few
    operations only, never while something is computed. `in_child`: what is done in a child, under the lock.
    """
    lock = RLock()

    def release() -> None:
        in_child()
        lock.release()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=release)
    return lock


class LongLock:
    """A lock that may be held for seconds: a fork does not wait for it, and in a child nobody has it.

    It may be taken again by the thread that has it.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = RLock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other thread is."""
        lock = self._lock  # in a child that forks in here it is another one then
        with lock:
            yield


def _renew_properties() -> None:
    """Give the cached properties of attnc new locks, in a child, as a thread that is no more may have been inside.

    Until Python 3.12 each has a lock, which is held while a value is computed; nothing is stored before it is whole.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "attnc" or module is None:
            continue
        for kind in [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == name]:
            for one in [x for x in vars(kind).values() if isinstance(x, cached_property)]:
                vars(one)["lock"] = RLock()


if hasattr(os, "register_at_fork") and sys.version_info < (3, 12):
    os.register_at_fork(after_in_child=_renew_properties)
