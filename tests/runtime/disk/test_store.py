"""Entries on disk are complete or absent, private and bounded; damaged or foreign entries are never served."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import pickle
import random
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from attnc.runtime.disk import folder as folders
from attnc.runtime.disk.folder import cache_folder
from attnc.runtime.disk.store import MOST, Store, limit, store, unwrapped, wrapped
from attnc.runtime.disk.triton import guard_triton, triton_folder

PAYLOAD = {"choice": "tiles 64", "ms": [1.5, 2.0], "of": {"a": None}}


@pytest.fixture
def disk_store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache" / "v1")


def file_of(disk_store: Store, name: str = "a") -> Path:
    path = disk_store.path("tuned", name)
    assert path is not None
    return path


def test_written_entries_are_read_back(disk_store: Store) -> None:
    assert disk_store.read("tuned", "a") is None
    assert disk_store.write("tuned", "a", PAYLOAD)
    assert disk_store.read("tuned", "a") == PAYLOAD
    assert disk_store.write("tuned", "a", {"choice": "other"})
    assert disk_store.read("tuned", "a") == {"choice": "other"}
    assert disk_store.read("rates", "a") is None
    assert [entry.name for entry in disk_store.entries()] == ["a"]


def test_files_are_private_to_the_user(disk_store: Store) -> None:
    before = os.umask(0)
    try:
        disk_store.write("tuned", "a", PAYLOAD)
    finally:
        os.umask(before)
    assert disk_store.folder is not None
    assert stat.S_IMODE(disk_store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file_of(disk_store).stat().st_mode) == 0o600


def test_a_folder_readable_by_others_is_made_private(disk_store: Store) -> None:
    assert disk_store.folder is not None
    disk_store.folder.mkdir(parents=True)
    disk_store.folder.chmod(0o777)
    assert disk_store.write("tuned", "a", PAYLOAD)
    assert stat.S_IMODE(disk_store.folder.stat().st_mode) == 0o700


def test_a_folder_of_another_user_is_not_used(
    disk_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk_store.write("tuned", "a", PAYLOAD)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert disk_store.read("tuned", "a") is None
    assert not disk_store.write("tuned", "a", PAYLOAD)
    assert disk_store.entries() == []
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "set ATTNC_CACHE_DIR" in warned[0].getMessage()


# --- damage ----------------------------------------------------------------------------------------------------------

MARKER = "attnc-was-here"


class _Runs:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def _foreign_contents(marker: Path) -> dict[str, bytes]:
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
    return {
        "nothing": b"",
        "a pickle": pickle.dumps(_Runs(marker)),
        "python": code.encode(),
        "python in json": json.dumps({"attnc": 1, "payload": f"__import__('os').system({code!r})"}).encode(),
        "a zip": b"PK\x03\x04" + bytes(100),
        "deep": b"[" * 100_000,
        "a list": b"[]",
        "no text": bytes(range(256)),
        "of another name": wrapped("tuned", "b", PAYLOAD),
        "of another kind": wrapped("rates", "a", PAYLOAD),
        "of another schema": wrapped("tuned", "a", PAYLOAD).replace(b'"attnc": 1', b'"attnc": 2'),
        "too large": wrapped("tuned", "a", {"x": "y" * MOST}),
        "numbers that are none": b'{"attnc": NaN}',
    }


@pytest.mark.parametrize("content", list(_foreign_contents(Path(MARKER))))
def test_foreign_content_is_ignored_and_overwritten(content: str, disk_store: Store, tmp_path: Path) -> None:
    marker = tmp_path / MARKER
    disk_store.write("tuned", "a", PAYLOAD)
    file_of(disk_store).write_bytes(_foreign_contents(marker)[content])
    assert disk_store.read("tuned", "a") is None
    (entry,) = disk_store.entries()
    assert entry.payload is None
    assert entry.damage
    assert disk_store.write("tuned", "a", PAYLOAD)
    assert disk_store.read("tuned", "a") == PAYLOAD
    assert not marker.exists()


def test_truncation_and_flipped_bits_are_detected(disk_store: Store) -> None:
    """For every truncation and a flipped bit in every byte, a read returns the written payload or None."""
    disk_store.write("tuned", "a", PAYLOAD)
    path, data = file_of(disk_store), file_of(disk_store).read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert disk_store.read("tuned", "a") in ((None, PAYLOAD) if length == len(data) - 1 else (None,)), length
    draw = random.Random(0)
    detected = 0
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(flipped))
        payload = disk_store.read("tuned", "a")
        # a flipped bit may turn one whitespace character of the layout into another: PAYLOAD
        assert payload in (None, PAYLOAD), position
        detected += payload is None
    assert detected > 0.8 * len(data)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to a device"])
def test_only_regular_files_are_entries(kind: str, disk_store: Store) -> None:
    disk_store.write("tuned", "b", PAYLOAD)
    path = file_of(disk_store)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if "device" in kind else "nowhere")
    assert disk_store.read("tuned", "a") is None
    disk_store.entries()
    assert disk_store.write("tuned", "a", PAYLOAD) == (kind != "folder")
    assert disk_store.read("tuned", "a") == (None if kind == "folder" else PAYLOAD)


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    disk_store = Store(tmp_path / "link")
    assert disk_store.write("tuned", "a", PAYLOAD)
    assert Store(tmp_path / "real").read("tuned", "a") == PAYLOAD


def test_a_file_where_the_folder_should_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("mine")
    disk_store = Store(tmp_path / "cache" / "v1")
    assert disk_store.read("tuned", "a") is None
    assert not disk_store.write("tuned", "a", PAYLOAD)
    assert (tmp_path / "cache").read_text() == "mine"
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


@pytest.mark.parametrize("name", ["../up", "a/b", "a b", "ü", "", "A", "-a", "a.b", "x/../../../evil"])
def test_names_that_leave_the_folder_are_refused(name: str, disk_store: Store) -> None:
    with pytest.raises(ValueError, match="not a valid entry name"):
        disk_store.write("tuned", name, PAYLOAD)
    assert disk_store.folder is not None
    assert not disk_store.folder.exists()


def test_file_handles_are_closed(disk_store: Store) -> None:
    disk_store.write("tuned", "b", PAYLOAD)
    file_of(disk_store).mkdir()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(20):
        disk_store.read("tuned", "a")
        disk_store.read("tuned", "b")
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after == before


def test_the_lock_does_not_follow_links(disk_store: Store, tmp_path: Path) -> None:
    disk_store.write("tuned", "a", PAYLOAD)
    assert disk_store.folder is not None
    (disk_store.folder / ".lock").symlink_to(tmp_path / "elsewhere")
    with disk_store.alone(0.0) as alone:
        assert not alone
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_opened_to_others_is_made_private_on_read(disk_store: Store) -> None:
    disk_store.write("tuned", "a", PAYLOAD)
    assert disk_store.folder is not None
    disk_store.folder.chmod(0o777)
    assert disk_store.read("tuned", "a") == PAYLOAD
    assert stat.S_IMODE(disk_store.folder.stat().st_mode) == 0o700


# --- failing disks ---------------------------------------------------------------------------------------------------

STEPS = ("mkdir", "stat", "open", "scandir", "replace", "unlink", "chmod", "fdopen", "close", "fstat")
REFUSALS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)


def _refusing(step: str, number: int, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Make the `number`-th call of an os function fail; the returned function tells whether that call happened."""
    real, count = getattr(os, step), [0]

    def refuse(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            if step == "close":
                real(*args, **kwargs)  # the system has closed the file all the same
            raise OSError(code, os.strerror(code), str(folder))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, step, refuse)
    return lambda: count[0] >= number


@pytest.mark.parametrize("code", REFUSALS, ids=[errno.errorcode[code] for code in REFUSALS])
@pytest.mark.parametrize("step", STEPS)
def test_a_failing_disk_loses_the_entry_only(
    step: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Let each call of each system function fail in turn, with a new folder and with an existing one."""
    reached = 0
    for warm in (False, True):
        for number in range(1, 8):
            disk_store = Store(tmp_path / f"{step}-{warm}-{number}" / "v1")
            assert disk_store.folder is not None
            if warm:
                disk_store.write("tuned", "a", PAYLOAD)
            caplog.clear()
            with monkeypatch.context() as patched:
                was_reached = _refusing(step, number, code, disk_store.folder, patched)
                disk_store.write("tuned", "a", {"new": True})
                payload = disk_store.read("tuned", "a")
                disk_store.entries()
                with disk_store.alone(0.0):
                    pass
                disk_store.clear()
                reached += was_reached()
            assert payload in (None, PAYLOAD, {"new": True})
            assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) <= 1
            assert disk_store.write("tuned", "a", PAYLOAD)
            assert disk_store.read("tuned", "a") == PAYLOAD
            assert (
                not [item for item in disk_store.folder.iterdir() if item.name.startswith(".part-")] or step == "unlink"
            )
    assert reached or step in ("chmod",)


def test_a_write_that_runs_out_of_space_keeps_the_old_entry(disk_store: Store) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full")
    disk_store.write("tuned", "a", PAYLOAD)
    with pytest.MonkeyPatch.context() as patched:
        real = os.fdopen

        def filling(handle: int, mode: str) -> Any:
            os.close(handle)
            return real(os.open(full, os.O_WRONLY), mode)

        patched.setattr(os, "fdopen", filling)
        assert not disk_store.write("tuned", "a", {"new": True})
    assert disk_store.read("tuned", "a") == PAYLOAD


def test_a_folder_that_is_read_only(disk_store: Store) -> None:
    disk_store.write("tuned", "a", PAYLOAD)
    assert disk_store.folder is not None
    if os.getuid() == 0:
        pytest.skip("root may write everywhere; failing disks are tested above")
    disk_store.folder.chmod(0o500)
    try:
        assert disk_store.read("tuned", "a") == PAYLOAD
        assert not disk_store.write("tuned", "b", PAYLOAD)
    finally:
        disk_store.folder.chmod(0o700)


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_the_oldest_entries_are_removed_first(disk_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNC_CACHE_LIMIT", "1")
    assert limit() == 1 << 20
    large = {"x": "y" * 90_000}
    for i in range(20):
        assert disk_store.write("tuned", f"n{i:02}", large)
        os.utime(file_of(disk_store, f"n{i:02}"), (i, i))
    entries = disk_store.entries()
    assert sum(entry.bytes for entry in entries) <= 1 << 20
    assert [entry.name for entry in entries] == [f"n{i:02}" for i in range(20 - len(entries), 20)]
    assert len(entries) >= 7


def test_files_left_by_dead_processes_are_removed(disk_store: Store) -> None:
    disk_store.write("tuned", "a", PAYLOAD)
    assert disk_store.folder is not None
    for name, age in ((".part-old", 7200), (".part-new", 0)):
        (disk_store.folder / name).write_text("half an ent")
        os.utime(disk_store.folder / name, (time.time() - age,) * 2)
    disk_store.write("tuned", "b", PAYLOAD)
    assert sorted(path.name for path in disk_store.folder.glob(".part-*")) == [".part-new"]
    (disk_store.folder / "notes.txt").write_text("mine")
    assert disk_store.clear() == 2
    assert sorted(path.name for path in disk_store.folder.iterdir() if path.name != ".lock") == ["notes.txt"]


# --- concurrency -----------------------------------------------------------------------------------------------------


def test_alone_excludes_other_threads(disk_store: Store) -> None:
    """Threads that each open their own handle exclude one another as processes do."""
    inside, most_inside, lock = [0], [0], threading.Lock()

    def work() -> None:
        with disk_store.alone(10.0) as alone:
            assert alone
            with lock:
                inside[0] += 1
                most_inside[0] = max(most_inside[0], inside[0])
            time.sleep(0.02)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most_inside == [1]
    with disk_store.alone(1.0) as first, disk_store.alone(0.05) as second:
        assert (first, second) == (True, False)


def test_the_lock_is_a_filelock(disk_store: Store) -> None:
    """The lock works on every system that filelock supports, Windows among them, and other programs can share it."""
    with disk_store.alone(0.0) as alone:
        assert alone
        assert disk_store.folder is not None
        with pytest.raises(Timeout), FileLock(disk_store.folder / ".lock", timeout=0):
            pass
    with FileLock(disk_store.folder / ".lock", timeout=0), disk_store.alone(0.0) as alone:
        assert not alone
    assert "fcntl" not in Path(inspect.getfile(Store)).read_text(encoding="utf-8")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_does_not_hold_the_lock(disk_store: Store) -> None:
    with disk_store.alone(0.0) as alone:
        assert alone
        child = os.fork()
        if not child:
            time.sleep(5)
            os._exit(0)
    try:
        with disk_store.alone(0.0) as again:
            assert again
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- location --------------------------------------------------------------------------------------------------------


def test_the_location_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "v1"
    monkeypatch.setenv("ATTNC_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "attnc" / "v1"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "attnc" / "v1"
    assert store().folder == cache_folder()

    def without_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", without_home)
    folders._folder.cache_clear()
    assert cache_folder() is None
    nowhere = store()
    assert nowhere.read("tuned", "a") is None
    assert not nowhere.write("tuned", "a", PAYLOAD)
    assert nowhere.entries() == []
    assert nowhere.clear() == 0
    with nowhere.alone(0.0) as alone:
        assert not alone
    folders._folder.cache_clear()


@pytest.mark.parametrize("text", ["²", "9" * 5000, "-1", "1e3", "many", ""])
def test_invalid_limits_give_the_default(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNC_CACHE_LIMIT", text)
    assert limit() == 64 << 20


def test_a_deleted_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for variable in ("ATTNC_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "relative-to-nothing")
    assert cache_folder() is None
    assert triton_folder() == Path("relative-to-nothing")
    assert store().read("tuned", "a") is None
    guard_triton()


def test_equal_payloads_give_equal_bytes() -> None:
    a = wrapped("tuned", "a", {"x": 1, "y": {"p": 1, "q": 2}})
    assert a == wrapped("tuned", "a", {"y": {"q": 2, "p": 1}, "x": 1})
    assert unwrapped("tuned", "a", a) == {"x": 1, "y": {"p": 1, "q": 2}}
