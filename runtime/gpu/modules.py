"""Kernel texts as functions that Triton compiles. The text comes from the emitter and is never read from a disk."""

from __future__ import annotations

import linecache
import logging
from threading import Lock
from types import ModuleType
from typing import Any

from attnc.compiler.kernels.source import KernelSource
from attnc.runtime.disk.triton import guard_triton

_log = logging.getLogger(__name__)

_functions: dict[str, Any] = {}
_lock = Lock()


def function_of(source: KernelSource) -> Any:
    """The kernel of a text, one for equal texts."""
    key = source.digest
    found = _functions.get(key)
    if found is None:
        with _lock:
            found = _functions.get(key) or _made(source)
            _functions[key] = found
    return found


def _made(source: KernelSource) -> Any:
    guard_triton()
    _log.debug("%s, text %s: made, and compiled by Triton when it is started first", source.function, source.digest)
    name = f"<attnc {source.function} {source.digest}>"
    module = ModuleType(f"attnc_kernel_{source.digest}")
    module.__file__ = name
    # Triton reads the source of its functions through `inspect`, which asks here.
    linecache.cache[name] = (len(source.text), None, source.text.splitlines(keepends=True), name)
    exec(compile(source.text, name, "exec"), module.__dict__)
    return getattr(module, source.function)
