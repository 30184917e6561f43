"""Entries by kind and name in one folder, shared by any number of processes.

An entry is written to a file of its own and renamed, so that it is there whole or not at all, whenever the process
dies. Whatever the disk refuses costs the entry and one warning, never the call. What is damaged or foreign is as good
as absent, and is written anew. Nothing decides by a time stamp but which entries go first when there are too many.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from attnc.runtime.disk.envelope import MOST, DamagedError, Payload, unwrapped, wrapped
from attnc.runtime.disk.folder import UnusableError, cache_folder, check_private, make_private
from attnc.runtime.disk.whole import write_whole
from attnc.runtime.environment import CACHE_LIMIT, text_of

_log = logging.getLogger(__name__)

T = TypeVar("T")

LIMIT_MIB = 64
"""What all entries may take together, unless ATTNC_CACHE_LIMIT says otherwise."""

KEPT = 0.75
"""The share of the limit that is left when entries have to go."""

ABANDONED = 3600.0
"""Seconds after which a file that was being written belongs to a process that died."""

_PART, _LOCK = ".part-", ".lock"
_KIND = re.compile(r"[a-z]+")
_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_FILE = re.compile(r"([a-z]+)-([a-z0-9]+(?:-[a-z0-9]+)*)\.json")


@dataclass(frozen=True)
class CacheEntry:
    """A file of the cache. `payload` is None where it is damaged, and `damage` says how."""

    kind: str
    name: str
    bytes: int
    payload: Payload | None
    damage: str | None = None


class Store:
    """The entries of a folder; None: there is none, and nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._warned = False

    def path(self, kind: str, name: str) -> Path | None:
        """The file of an entry."""
        if not (_KIND.fullmatch(kind) and _NAME.fullmatch(name)):
            raise ValueError(f"{kind}-{name} is no name of an entry")
        return None if self.folder is None else self.folder / f"{kind}-{name}.json"

    def read(self, kind: str, name: str) -> Payload | None:
        """The payload of an entry; None where it is missing, damaged or cannot be read."""
        path = self.path(kind, name)
        if path is None:
            return None
        data = self._tolerant(lambda: self._bytes(path), "read")
        if data is None:
            return None
        try:
            return unwrapped(kind, name, data)
        except DamagedError as error:
            _log.warning("%s is ignored, and will be written anew: %s", path, error)
            return None

    def _bytes(self, path: Path) -> bytes | None:
        """What is in a file; None where there is none. Pipes and devices are none. Raises OSError, UnusableError."""
        try:
            check_private(path.parent)
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not _is_file(handle):
            return b""
        with os.fdopen(handle, "rb") as file:
            return file.read(MOST)

    def write(self, kind: str, name: str, payload: Payload) -> bool:
        """Keep a payload under a name, in place of what was there; False where the disk does not take it."""
        path = self.path(kind, name)
        if path is None:
            self._warn("there is no home folder; set ATTNC_CACHE_DIR")
            return False
        data = wrapped(kind, name, payload)
        if len(data) >= MOST:
            self._warn(f"an entry of {len(data)} bytes is too large")
            return False
        done = self._tolerant(lambda: self._replace(path, data), "written")
        if done:
            self._tolerant(self._shrink, "shrunk")
        return bool(done)

    def _replace(self, path: Path, data: bytes) -> bool:
        make_private(path.parent)
        write_whole(path, data, prefix=_PART)
        return True

    def entries(self) -> list[CacheEntry]:
        """All entries, by kind and name."""
        found = []
        for file in sorted(self._files(), key=lambda file: file.path):
            match = _FILE.fullmatch(file.path.name)
            assert match
            kind, name = match.groups()
            data = self._tolerant(partial(self._bytes, file.path), "read")
            if data is None:
                continue
            try:
                found.append(CacheEntry(kind, name, file.bytes, unwrapped(kind, name, data)))
            except DamagedError as error:
                found.append(CacheEntry(kind, name, file.bytes, None, str(error)))
        return found

    def clear(self) -> int:
        """Remove every entry, and what dead processes left; how many entries there were. Other files stay."""
        gone = [self._tolerant(partial(_unlink, file.path), "removed") for file in self._files()]
        for file in self._parts():
            self._tolerant(partial(_unlink, file.path), "removed")
        return sum(map(bool, gone))

    @contextmanager
    def alone(self, seconds: float) -> Iterator[bool]:
        """Inside, no other process of this machine is inside; False after so many seconds, or where the disk refuses.

        The lock ends with its process, however that ends.
        """
        lock = self._tolerant(lambda: self._locked(seconds), "locked")
        try:
            yield lock is not None
        finally:
            if lock is not None:
                with suppress(OSError):  # the system gives it back when the process ends
                    lock.release()

    def _locked(self, seconds: float) -> BaseFileLock | None:
        """Return the lock of the folder, acquired; None after so many seconds. Raises OSError, UnusableError.

        `filelock` locks on Windows too, follows no link, and a child of a fork does not have its parent's lock.
        """
        if self.folder is None:
            return None
        make_private(self.folder)
        lock = FileLock(self.folder / _LOCK, mode=0o600, thread_local=False)
        try:
            lock.acquire(timeout=seconds, poll_interval=0.02)
        except Timeout:
            return None
        return lock

    # --- inside ---

    def _files(self) -> list[_File]:
        """The files of entries."""
        return [file for file in self._scanned() if _FILE.fullmatch(file.path.name)]

    def _parts(self) -> list[_File]:
        """What is being written, or what a process that died while it wrote has left."""
        return [file for file in self._scanned() if file.path.name.startswith(_PART)]

    def _scanned(self) -> list[_File]:
        folder = self.folder
        return [] if folder is None else self._tolerant(lambda: _scan(folder), "listed") or []

    def _shrink(self) -> None:
        """Remove entries, those first that were written first, where all together are past the limit."""
        for file in self._parts():
            if time.time() - file.written > ABANDONED:
                _unlink(file.path)
        files = self._files()
        total, most = sum(file.bytes for file in files), limit()
        if total <= most:
            return
        for file in sorted(files, key=lambda file: (file.written, file.path)):
            total -= file.bytes
            _unlink(file.path)
            if total <= KEPT * most:
                break

    def _tolerant(self, act: Callable[[], T], what: str) -> T | None:
        """What an action on the disk gives; None, and one warning, where the disk refuses it."""
        try:
            return act()
        except FileNotFoundError:  # another process was quicker
            return None
        except (OSError, UnusableError) as error:
            self._warn(f"could not be {what}: {error}")
            return None

    def _warn(self, reason: str) -> None:
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        _log.log(level, "the cache %s %s; nothing is lost but time (attnc cache path)", self.folder or "", reason)


@dataclass(frozen=True)
class _File:
    """A file of the folder; `written`: when, by the clock of whoever did."""

    path: Path
    bytes: int
    written: float


def _scan(folder: Path) -> list[_File]:
    """The files of a folder. Raises OSError, UnusableError."""
    check_private(folder)
    found = []
    with os.scandir(folder) as items:
        for item in items:
            with suppress(FileNotFoundError):  # another process was quicker
                facts = item.stat(follow_symlinks=False)
                found.append(_File(Path(item.path), facts.st_size, facts.st_mtime))
    return found


def _is_file(handle: int) -> bool:
    """Whether an open file is one, and no folder, pipe or device; else it is closed. Raises OSError."""
    try:
        found = stat.S_ISREG(os.fstat(handle).st_mode)
    except OSError:
        os.close(handle)
        raise
    if not found:
        os.close(handle)
    return found


def _unlink(path: Path) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def limit() -> int:
    """Bytes that all entries may take together."""
    text = text_of(CACHE_LIMIT)
    told = text.isascii() and text.isdigit() and len(text) < 8
    return int(text if told else LIMIT_MIB) << 20


_stores: dict[Path | None, Store] = {}


def store() -> Store:
    """The store of this process, wherever the environment says that it is."""
    folder = cache_folder()
    return _stores.setdefault(folder, Store(folder))
