"""Where the cache is, and whether it may be used: a folder that only its user reads and writes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from attnc.runtime.environment import CACHE_DIR, XDG_CACHE_HOME, text_of

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
    own = text_of(CACHE_DIR)
    if own:
        return Path(own).absolute() / INSIDE
    shared = text_of(XDG_CACHE_HOME)
    try:
        base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "attnc" / INSIDE


def make_private(folder: Path) -> None:
    """Make a folder that is the user's alone, or make the one that is there so.

    Raises OSError, UnusableError for a folder of somebody else.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    check_private(folder, mend=True)


def check_private(folder: Path, *, mend: bool = False) -> None:
    """Raise UnusableError where others own or write a folder; `mend`: take from others what they may do.

    Where the file system has no such rights (FAT, some network drives) nothing can be asked of it.
    """
    found = os.stat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise UnusableError(f"{folder} is no folder")
    if not hasattr(os, "getuid"):
        return
    if found.st_uid != os.getuid():
        raise UnusableError(f"{folder} belongs to another user; set ATTNC_CACHE_DIR to a folder of your own")
    if mend and found.st_mode & OTHERS:
        os.chmod(folder, stat.S_IMODE(found.st_mode) & ~OTHERS)
