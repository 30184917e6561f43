"""Atomic file writes: a file exists completely or not at all, whenever the writing process dies."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes, *, prefix: str, mode: int | None = None) -> None:
    """Write a temporary file and rename it; the previous file stays until then.

    `prefix`: of the temporary file's name; `mode`: its permissions, None: the user alone. Raises OSError.
    """
    handle, part = tempfile.mkstemp(prefix=prefix, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        if mode is not None:
            os.chmod(part, mode)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


def write_for_user(path: Path, data: bytes) -> None:
    """Write a file that the user named: through links, with its previous permissions, or those of new files.

    Raises OSError.
    """
    target = path.resolve()
    mode = target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask()
    write_whole(target, data, prefix=f".{target.name}.", mode=mode)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
