"""Where the cache is, and whether it may be used: a folder that only its user reads and writes."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from attnc.runtime.environment import CACHE_DIR, HOME, XDG_CACHE_HOME, text_of

INSIDE = "v1"
"""The folder of entries, made by attnc inside of the one that the user names, which may be anybody's."""

OTHERS = 0o077
"""What a private folder allows nobody else."""


class UnusableError(Exception):
    """A folder that cannot be the cache. The message says why, and what helps."""


def cache_folder() -> Path | None:
    """Where entries lie: under ATTNC_CACHE_DIR, else `attnc` in the user's cache folder; None where there is no home.

    XDG_CACHE_HOME counts where it is absolute, as the XDG Base Directory Specification has it.
    """
    return _folder(text_of(CACHE_DIR), text_of(XDG_CACHE_HOME), text_of(HOME))


@lru_cache(16)
def _folder(own: str, shared: str, home: str) -> Path | None:
    """The same by what it depends on."""
    del home  # which `Path.home` reads
    try:
        if own:
            return Path(own).absolute() / INSIDE
        base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    except (RuntimeError, OSError):  # no home, or a folder that is relative to one that is gone
        return None
    return base / "attnc" / INSIDE


def make_private(folder: Path) -> None:
    """Make a folder that is the user's alone, or make the one that is there so.

    Raises OSError, UnusableError for a folder of somebody else.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Take from others what they may do in a folder. Raises OSError, UnusableError for one of somebody else.

    Where the file system has no such rights (FAT, some network drives), or takes no changes, nothing can be done.
    """
    found = os.stat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise UnusableError(f"{folder} is no folder")
    if not hasattr(os, "getuid"):
        return
    if found.st_uid != os.getuid():
        raise UnusableError(f"{folder} belongs to another user; set ATTNC_CACHE_DIR to a folder of your own")
    if found.st_mode & OTHERS:
        with suppress(OSError):
            os.chmod(folder, stat.S_IMODE(found.st_mode) & ~OTHERS)
