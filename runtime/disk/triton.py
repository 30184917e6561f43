"""Triton's own cache of compiled kernels: its location, and whether other users can write to it.

The folder belongs to Triton: its files are code that is loaded and run, so only its user may write them.
"""

from __future__ import annotations

import logging
import os
import stat
from functools import lru_cache
from pathlib import Path

from attnc.runtime.process.environment import TRITON_CACHE_DIR, TRITON_HOME, text_of

_log = logging.getLogger(__name__)

WRITERS = 0o022


def triton_folder() -> Path:
    """Return the folder of Triton's compiled kernels: TRITON_CACHE_DIR, else under TRITON_HOME or the home folder."""
    named = text_of(TRITON_CACHE_DIR)
    return _absolute(named or text_of(TRITON_HOME) or os.path.expanduser("~")) / ("" if named else ".triton/cache")


def _absolute(path: str) -> Path:
    """Return an absolute path, where the working directory still exists, so that relative paths have a meaning."""
    try:
        return Path(os.path.abspath(path))
    except OSError:
        return Path(path)


def triton_state(folder: Path) -> str:
    """Return the state of the folder, in words."""
    try:
        status = os.stat(folder)
    except OSError as error:
        return "not created yet" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    fault = _fault(status)
    return "only the user can write" if fault is None else fault


def _fault(status: os.stat_result) -> str | None:
    if not hasattr(os, "getuid"):
        return None
    if status.st_uid not in (os.getuid(), 0):
        return "it belongs to another user, whose kernels would run here"
    return "others may write there, and its files are executed: run chmod go-w" if status.st_mode & WRITERS else None


def guard_triton() -> None:
    """Create Triton's folder for the user alone before Triton does; warn if others can write to an existing one.

    Where the disk refuses, Triton reports the error itself.
    """
    _guard(triton_folder())


@lru_cache(8)
def _guard(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.stat(folder)
    except OSError as error:
        _log.info("Triton's cache %s: %s", folder, error)
        return
    fault = _fault(status)
    if fault is not None and stat.S_ISDIR(status.st_mode):
        _log.warning("Triton's cache %s: %s", folder, fault)
