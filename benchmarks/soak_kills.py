"""A soak test that kills processes while they write."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from soak_sizes import CallSize, Row


def kills(size: CallSize) -> Row:
    """Kill a process that writes entries and holds the lock at random moments, and read everything after each kill.

    Every second process is killed inside a write: after some of its bytes, or around the renaming.
    """
    from attnc.runtime.disk.store import Store

    draw = random.Random(0)
    failures: list[str] = []
    served = cut_short = 0
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "v1")
        for i in range(size.kills):
            child = os.fork()
            if child == 0:
                if i % 2:
                    _Death(random.Random(i)).awaits()
                _write_for_ever(store, i)
            if not i % 2:
                time.sleep(draw.uniform(0.002, 0.03))
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            for name in NAMES:
                served_entry = store.read("tuned", name)
                served += served_entry is not None
                if served_entry is not None and served_entry["sum"] != _sum(served_entry["text"]):
                    failures.append(f"kill {i}: {name} was served damaged")
            failures += [f"kill {i}: {entry.name}: {entry.damage}" for entry in store.entries() if entry.damage]
            with store.alone(1.0) as alone:
                if not alone:
                    failures.append(f"kill {i}: the lock of a dead process holds")
        assert store.folder is not None
        cut_short = len(list(store.folder.glob(".part-*")))
        if not store.write("tuned", NAMES[0], _payload(0)) or store.read("tuned", NAMES[0]) != _payload(0):
            failures.append("the cache cannot be written anymore")
        store.clear()
        left = [path.name for path in store.folder.iterdir() if path.name != ".lock"]
        failures += [f"clear left {name}" for name in left]
    if not (served and cut_short):
        failures.append(f"nothing was tried: {served} entries served, {cut_short} writes cut short")
    return {"kills": size.kills, "entries_served": served, "writes_cut_short": cut_short, "failures": failures[:20]}


NAMES = ("a", "b", "c", "d")


def _write_for_ever(store: Any, seed: int) -> None:
    draw = random.Random(seed)
    while True:
        with store.alone(0.0):
            store.write("tuned", draw.choice(NAMES), _payload(draw.randrange(1 << 30)))


class _Death:
    """Kills this process in one of its next writes: after some bytes, or before or after the renaming."""

    def __init__(self, draw: random.Random) -> None:
        self.left, self.share = draw.randrange(3), draw.random()
        self.where = draw.choice(("bytes", "before", "after"))
        self.real_open, self.real_replace = os.fdopen, os.replace

    def awaits(self) -> None:
        """Start to wait for the chosen write."""
        mock.patch.object(os, "fdopen", self.open).start()
        mock.patch.object(os, "replace", self.replace).start()

    def comes(self, where: str) -> None:
        """Kill the process if this is the chosen moment."""
        if self.left < 0 and self.where == where:
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, handle: int, mode: str) -> Any:
        """Replace `os.fdopen`: the file may end in the middle."""
        return _Cut(self, handle) if mode == "wb" else self.real_open(handle, mode)

    def replace(self, part: str, path: str) -> None:
        """Replace `os.replace`."""
        self.comes("before")
        self.real_replace(part, path)
        self.comes("after")


class _Cut:
    """A file that ends in the middle."""

    def __init__(self, death: _Death, handle: int) -> None:
        self.death, self.file = death, death.real_open(handle, "wb", buffering=0)

    def __enter__(self) -> _Cut:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        """Write some of the bytes if the file ends here."""
        self.death.left -= 1
        is_cut = self.death.left < 0 and self.death.where == "bytes"
        self.file.write(data[: int(self.death.share * len(data))] if is_cut else data)
        self.death.comes("bytes")


def _payload(number: int) -> dict[str, str]:
    text = str(number) * random.Random(number).randrange(1, 40_000)
    return {"text": text, "sum": _sum(text)}


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
