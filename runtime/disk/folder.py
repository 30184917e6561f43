"""The location of the cache folder, and checks that only its user can read and write it."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from attnc.runtime.process.environment import CACHE_DIR, HOME, XDG_CACHE_HOME, text_of

INSIDE = "v1"
"""The folder of entries, created by attnc inside the folder that the user names, which may be shared."""

OTHERS = 0o077
"""Permission bits that a private folder grants to nobody else."""


class UnusableError(Exception):
    """The folder cannot be the cache. The message says why, and names a remedy."""


def cache_folder() -> Path | None:
    """Return the folder of entries: under ATTNC_CACHE_DIR, else in the user's cache folder; None without a home.

    XDG_CACHE_HOME counts only if it is absolute, as the XDG Base Directory Specification requires.
    """
    return _folder(text_of(CACHE_DIR), text_of(XDG_CACHE_HOME), text_of(HOME))


@lru_cache(16)
def _folder(named: str, shared: str, home: str) -> Path | None:
    """Return the cache folder for the values of ATTNC_CACHE_DIR, XDG_CACHE_HOME and HOME."""
    del home  # only a cache key: `Path.home` reads it
    try:
        if named:
            return Path(named).absolute() / INSIDE
        base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    except (RuntimeError, OSError):  # no home, or a relative path in a removed working directory
        return None
    return base / "attnc" / INSIDE


def make_private(folder: Path) -> None:
    """Create a folder that only the user can access, or restrict an existing one.

    Raises OSError, and UnusableError for a folder of another user.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Remove other users' permissions from a folder. Raises OSError, UnusableError for another user's folder.

    Where the file system has no permissions (FAT, some network drives), or refuses changes, nothing happens.
    """
    status = os.stat(folder)
    if not stat.S_ISDIR(status.st_mode):
        raise UnusableError(f"{folder} is not a folder")
    if not hasattr(os, "getuid"):
        return
    if status.st_uid != os.getuid():
        raise UnusableError(f"{folder} belongs to another user; set ATTNC_CACHE_DIR to a folder that you own")
    if status.st_mode & OTHERS:
        with suppress(OSError):
            os.chmod(folder, stat.S_IMODE(status.st_mode) & ~OTHERS)
