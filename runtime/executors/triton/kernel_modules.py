"""Kernel texts as functions that Triton compiles. The text comes from the emitter and is never read from disk."""

from __future__ import annotations

import linecache
import logging
from types import ModuleType
from typing import Any
from weakref import finalize

from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.runtime.disk.triton import guard_triton
from attnc.runtime.process.recent import Recent
from attnc.runtime.settings import SETTINGS

_log = logging.getLogger(__name__)

_FUNCTIONS: Recent[Any] = Recent(SETTINGS.kernels)
"""Functions by the digest of their text; each holds the binaries that Triton has compiled for it."""


def function_of(source: KernelSource) -> Any:
    """Return the kernel function of a text; equal texts share one function."""
    return _FUNCTIONS.get(source.digest, lambda: _made(source))


def _made(source: KernelSource) -> Any:
    guard_triton()
    _log.debug("%s, text %s: created; Triton compiles it at its first launch", source.function, source.digest)
    name = f"<attnc {source.function} {source.digest}>"
    module = ModuleType(f"attnc_kernel_{source.digest}")
    module.__file__ = name
    # Triton reads the source of its functions through `inspect`, which looks here.
    lines = (len(source.text), None, source.text.splitlines(keepends=True), name)
    linecache.cache[name] = lines
    exec(compile(source.text, name, "exec"), module.__dict__)
    function = getattr(module, source.function)
    finalize(function, _forget, name, lines)
    return function


def _forget(name: str, lines: Any) -> None:
    """Remove the text of a function that was freed, unless it was created again."""
    if linecache.cache.get(name) is lines:
        del linecache.cache[name]
