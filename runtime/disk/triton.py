"""Triton's own cache of compiled kernels: where it is, and whether anybody else can write there.

It stays Triton's: what lies there is code that is loaded and run, so nobody but its user may write it.
"""

from __future__ import annotations

import logging
import os
import stat
from functools import lru_cache
from pathlib import Path

from attnc.runtime.environment import TRITON_CACHE_DIR, TRITON_HOME, text_of

_log = logging.getLogger(__name__)

WRITERS = 0o022


def triton_folder() -> Path:
    """Where Triton keeps what it compiled: TRITON_CACHE_DIR, else below TRITON_HOME or the home folder."""
    own = text_of(TRITON_CACHE_DIR)
    if own:
        return Path(os.path.abspath(own)) if _has_place() else Path(own)
    home = text_of(TRITON_HOME) or os.path.expanduser("~")
    return (Path(os.path.abspath(home)) if _has_place() else Path(home)) / ".triton" / "cache"


def _has_place() -> bool:
    """Whether this process is in a folder that still is there, so that relative paths have a meaning."""
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def triton_state(folder: Path) -> str:
    """What is to be known of the folder, in words."""
    try:
        found = os.stat(folder)
    except OSError as error:
        return "not there yet" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    fault = _fault(found)
    return "the user's alone" if fault is None else fault


def _fault(found: os.stat_result) -> str | None:
    if not hasattr(os, "getuid"):
        return None
    if found.st_uid not in (os.getuid(), 0):
        return "it belongs to another user, whose kernels would run here"
    return "others may write there, and what lies there runs: chmod go-w" if found.st_mode & WRITERS else None


def guard_triton() -> None:
    """Make Triton's folder the user's alone, if it is not there yet, before Triton makes it; warn of one that is not.

    The disk may refuse: then Triton says so itself.
    """
    _guard(triton_folder())


@lru_cache(8)
def _guard(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.stat(folder)
    except OSError as error:
        _log.info("Triton's cache %s: %s", folder, error)
        return
    fault = _fault(found)
    if fault is not None and stat.S_ISDIR(found.st_mode):
        _log.warning("Triton's cache %s: %s", folder, fault)
