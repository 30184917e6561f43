"""Cache entries by kind and name in one folder, shared by any number of processes.

An entry is written to a temporary file and renamed, so that it exists completely or not at all, whenever the process
dies. A disk error costs the entry and one warning, never the call. Damaged or foreign entries count as absent, and are
written again. An entry's file is JSON with its kind and name, and a digest that detects damage. Timestamps decide
nothing but which entries are removed first when there are too many.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from attnc.runtime.disk.folder import UnusableError, cache_folder, check_private, make_private
from attnc.runtime.disk.whole import write_whole
from attnc.runtime.process.environment import CACHE_LIMIT, text_of

_log = logging.getLogger(__name__)

T = TypeVar("T")

LIMIT_MIB = 64
"""Default limit on the total size of all entries in MiB; ATTNC_CACHE_LIMIT overrides it."""

KEPT = 0.75
"""Fraction of the limit that remains filled after entries are removed."""

ABANDONED = 3600.0
"""Seconds after which a temporary file belongs to a process that died."""

_PART, _LOCK = ".part-", ".lock"
_KIND = re.compile(r"[a-z]+")
_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_FILE = re.compile(r"([a-z]+)-([a-z0-9]+(?:-[a-z0-9]+)*)\.json")


@dataclass(frozen=True)
class CacheEntry:
    """A file of the cache. `payload` is None for a damaged file, and `damage` says how."""

    kind: str
    name: str
    bytes: int
    payload: Payload | None
    damage: str | None = None


class Store:
    """The entries of a folder; with None for the folder, nothing is stored."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._warned = False

    def path(self, kind: str, name: str) -> Path | None:
        """Return the file of an entry."""
        if not (_KIND.fullmatch(kind) and _NAME.fullmatch(name)):
            raise ValueError(f"{kind}-{name} is not a valid entry name")
        return None if self.folder is None else self.folder / f"{kind}-{name}.json"

    def read(self, kind: str, name: str) -> Payload | None:
        """Return the payload of an entry; None where it is missing, damaged or cannot be read."""
        path = self.path(kind, name)
        if path is None:
            return None
        data = self._tolerant(lambda: self._bytes(path), "read")
        if data is None:
            return None
        try:
            return unwrapped(kind, name, data)
        except DamagedError as error:
            _log.warning("%s is ignored, and will be written again: %s", path, error)
            return None

    def _bytes(self, path: Path) -> bytes | None:
        """Return a file's bytes; None if it does not exist, b"" for a pipe or device. Raises OSError, UnusableError."""
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
        """Store a payload under a name, replacing the previous one; False where the disk refuses it."""
        path = self.path(kind, name)
        if path is None:
            self._warn("has no home folder; set ATTNC_CACHE_DIR")
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
        """Return all entries, by kind and name."""
        entries = []
        for file in sorted(self._files(), key=lambda file: file.path):
            match = _FILE.fullmatch(file.path.name)
            assert match
            kind, name = match.groups()
            data = self._tolerant(partial(self._bytes, file.path), "read")
            if data is None:
                continue
            try:
                entries.append(CacheEntry(kind, name, file.bytes, unwrapped(kind, name, data)))
            except DamagedError as error:
                entries.append(CacheEntry(kind, name, file.bytes, None, str(error)))
        return entries

    def clear(self) -> int:
        """Remove every entry, and temporary files of dead processes; return the number of entries. Other files stay."""
        removed = [self._tolerant(partial(_unlink, file.path), "removed") for file in self._files()]
        for file in self._parts():
            self._tolerant(partial(_unlink, file.path), "removed")
        return sum(map(bool, removed))

    @contextmanager
    def alone(self, seconds: float) -> Iterator[bool]:
        """Hold the folder's lock on this machine; yields False after `seconds`, or where the disk refuses the lock.

        The lock ends with its process, however that ends.
        """
        lock = self._tolerant(lambda: self._locked(seconds), "locked")
        try:
            yield lock is not None
        finally:
            if lock is not None:
                with suppress(OSError):  # the system releases it when the process ends
                    lock.release()

    def _locked(self, seconds: float) -> BaseFileLock | None:
        """Return the lock of the folder, acquired; None after `seconds`. Raises OSError, UnusableError.

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
        """Return the files of entries."""
        return [file for file in self._scanned() if _FILE.fullmatch(file.path.name)]

    def _parts(self) -> list[_File]:
        """Return the temporary files: being written, or left by a process that died while writing."""
        return [file for file in self._scanned() if file.path.name.startswith(_PART)]

    def _scanned(self) -> list[_File]:
        folder = self.folder
        return [] if folder is None else self._tolerant(lambda: _scan(folder), "listed") or []

    def _shrink(self) -> None:
        """Remove entries, the oldest first, where all together exceed the limit."""
        for file in self._parts():
            if time.time() - file.written > ABANDONED:
                _unlink(file.path)
        files = self._files()
        total, max_bytes = sum(file.bytes for file in files), limit()
        if total <= max_bytes:
            return
        for file in sorted(files, key=lambda file: (file.written, file.path)):
            total -= file.bytes
            _unlink(file.path)
            if total <= KEPT * max_bytes:
                break

    def _tolerant(self, act: Callable[[], T], what: str) -> T | None:
        """Return the result of an action on the disk; None, and one warning, where the disk refuses it."""
        try:
            return act()
        except FileNotFoundError:  # another process was faster
            return None
        except (OSError, UnusableError) as error:
            self._warn(f"could not be {what}: {error}")
            return None

    def _warn(self, reason: str) -> None:
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        _log.log(level, "the cache %s %s; only time is lost (attnc cache path)", self.folder or "", reason)


@dataclass(frozen=True)
class _File:
    """A file of the folder; `written`: the time of writing, by the clock of the writer."""

    path: Path
    bytes: int
    written: float


def _scan(folder: Path) -> list[_File]:
    """Return the files of a folder. Raises OSError, UnusableError."""
    check_private(folder)
    files = []
    with os.scandir(folder) as items:
        for item in items:
            with suppress(FileNotFoundError):  # another process was faster
                status = item.stat(follow_symlinks=False)
                files.append(_File(Path(item.path), status.st_size, status.st_mtime))
    return files


def _is_file(handle: int) -> bool:
    """Check whether an open handle is a regular file, and close it otherwise. Raises OSError."""
    try:
        is_regular = stat.S_ISREG(os.fstat(handle).st_mode)
    except OSError:
        os.close(handle)
        raise
    if not is_regular:
        os.close(handle)
    return is_regular


def _unlink(path: Path) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def limit() -> int:
    """Return the limit on the total size of all entries, in bytes."""
    text = text_of(CACHE_LIMIT)
    is_valid = text.isascii() and text.isdigit() and len(text) < 8
    return int(text if is_valid else LIMIT_MIB) << 20


_stores: dict[Path | None, Store] = {}


def store() -> Store:
    """Return the store of this process, in the folder that the environment names."""
    folder = cache_folder()
    return _stores.setdefault(folder, Store(folder))


# --- the format of an entry ------------------------------------------------------------------------------------------


SCHEMA = 1
"""The version of the entry format. Entries of other versions are ignored."""

MOST = 1 << 20
"""Maximum size of an entry in bytes; no more is read."""

Payload = Mapping[str, Any]


class DamagedError(Exception):
    """The bytes are not an entry of that name. The message says why."""


def wrapped(kind: str, name: str, payload: Payload) -> bytes:
    """Return an entry as bytes, which are equal for equal payloads."""
    body = _canonical(payload)
    envelope = {"attnc": SCHEMA, "kind": kind, "name": name, "sha256": _digest(kind, name, body), "payload": payload}
    return json.dumps(envelope, ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n"


def unwrapped(kind: str, name: str, data: bytes) -> Payload:
    """Return the payload of an entry. Raises DamagedError for bytes that `wrapped` did not make for this name."""
    try:
        envelope = json.loads(data.decode())
        if envelope["attnc"] != SCHEMA:
            raise DamagedError(f"its format version is {envelope['attnc']!r}, not {SCHEMA}")
        if (envelope["kind"], envelope["name"]) != (kind, name):
            raise DamagedError("the file holds another entry")
        payload = envelope["payload"]
        if envelope["sha256"] != _digest(kind, name, _canonical(payload)):
            raise DamagedError("its digest does not match its content")
    except (ValueError, TypeError, KeyError, RecursionError, ArithmeticError) as error:
        raise DamagedError(f"it is not an entry of attnc ({type(error).__name__})") from error
    if not isinstance(payload, dict):
        raise DamagedError("its content is not a JSON object")
    return payload


def _canonical(payload: object) -> str:
    return json.dumps(payload, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _digest(kind: str, name: str, body: str) -> str:
    return hashlib.sha256(f"{SCHEMA}\0{kind}\0{name}\0{body}".encode()).hexdigest()
