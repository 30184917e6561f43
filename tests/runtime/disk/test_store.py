"""Entries: whole or not there, private, bounded; what is damaged or foreign is never served and never run."""

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
from attnc.runtime.disk.envelope import MOST, unwrapped, wrapped
from attnc.runtime.disk.folder import cache_folder
from attnc.runtime.disk.store import Store, limit, store
from attnc.runtime.disk.triton import guard_triton, triton_folder

PAYLOAD = {"choice": "tiles 64", "ms": [1.5, 2.0], "of": {"a": None}}


@pytest.fixture
def own(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache" / "v1")


def file_of(own: Store, name: str = "a") -> Path:
    path = own.path("tuned", name)
    assert path is not None
    return path


def test_what_is_written_is_read(own: Store) -> None:
    assert own.read("tuned", "a") is None
    assert own.write("tuned", "a", PAYLOAD)
    assert own.read("tuned", "a") == PAYLOAD
    assert own.write("tuned", "a", {"choice": "other"})
    assert own.read("tuned", "a") == {"choice": "other"}
    assert own.read("rates", "a") is None
    assert [entry.name for entry in own.entries()] == ["a"]


def test_it_is_the_users_alone(own: Store) -> None:
    before = os.umask(0)
    try:
        own.write("tuned", "a", PAYLOAD)
    finally:
        os.umask(before)
    assert own.folder is not None
    assert stat.S_IMODE(own.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file_of(own).stat().st_mode) == 0o600


def test_a_folder_that_others_may_read_is_closed(own: Store) -> None:
    assert own.folder is not None
    own.folder.mkdir(parents=True)
    own.folder.chmod(0o777)
    assert own.write("tuned", "a", PAYLOAD)
    assert stat.S_IMODE(own.folder.stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_is_not_used(
    own: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own.write("tuned", "a", PAYLOAD)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert own.read("tuned", "a") is None
    assert not own.write("tuned", "a", PAYLOAD)
    assert own.entries() == []
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "set ATTNC_CACHE_DIR" in warned[0].getMessage()


# --- damage ----------------------------------------------------------------------------------------------------------

MARKER = "attnc-was-here"


class _Runs:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def _foreign(marker: Path) -> dict[str, bytes]:
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


@pytest.mark.parametrize("what", list(_foreign(Path(MARKER))))
def test_what_is_foreign_is_derived_again(what: str, own: Store, tmp_path: Path) -> None:
    marker = tmp_path / MARKER
    own.write("tuned", "a", PAYLOAD)
    file_of(own).write_bytes(_foreign(marker)[what])
    assert own.read("tuned", "a") is None
    (entry,) = own.entries()
    assert entry.payload is None
    assert entry.damage
    assert own.write("tuned", "a", PAYLOAD)
    assert own.read("tuned", "a") == PAYLOAD
    assert not marker.exists()


def test_any_truncation_and_any_flipped_bit_is_seen(own: Store) -> None:
    """Every cut; and flipped bits everywhere: what is served is what was written, or nothing."""
    own.write("tuned", "a", PAYLOAD)
    path, whole = file_of(own), file_of(own).read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert own.read("tuned", "a") in ((None, PAYLOAD) if length == len(whole) - 1 else (None,)), length
    draw = random.Random(0)
    seen = 0
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(flipped))
        found = own.read("tuned", "a")
        assert found in (None, PAYLOAD), at  # a space of the layout may become another one
        seen += found is None
    assert seen > 0.8 * len(whole)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to a device"])
def test_what_is_no_file_is_no_entry(kind: str, own: Store) -> None:
    own.write("tuned", "b", PAYLOAD)
    path = file_of(own)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if "device" in kind else "nowhere")
    assert own.read("tuned", "a") is None
    own.entries()
    assert own.write("tuned", "a", PAYLOAD) == (kind != "folder")
    assert own.read("tuned", "a") == (None if kind == "folder" else PAYLOAD)


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    own = Store(tmp_path / "link")
    assert own.write("tuned", "a", PAYLOAD)
    assert Store(tmp_path / "real").read("tuned", "a") == PAYLOAD


def test_a_file_where_the_folder_should_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("mine")
    own = Store(tmp_path / "cache" / "v1")
    assert own.read("tuned", "a") is None
    assert not own.write("tuned", "a", PAYLOAD)
    assert (tmp_path / "cache").read_text() == "mine"
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


@pytest.mark.parametrize("name", ["../up", "a/b", "a b", "ü", "", "A", "-a", "a.b", "x/../../../evil"])
def test_names_that_lead_elsewhere_are_refused(name: str, own: Store) -> None:
    with pytest.raises(ValueError, match="not a valid entry name"):
        own.write("tuned", name, PAYLOAD)
    assert own.folder is not None
    assert not own.folder.exists()


def test_nothing_stays_open(own: Store) -> None:
    own.write("tuned", "b", PAYLOAD)
    file_of(own).mkdir()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(20):
        own.read("tuned", "a")
        own.read("tuned", "b")
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert after == before


def test_the_lock_follows_no_link(own: Store, tmp_path: Path) -> None:
    own.write("tuned", "a", PAYLOAD)
    assert own.folder is not None
    (own.folder / ".lock").symlink_to(tmp_path / "elsewhere")
    with own.alone(0.0) as alone:
        assert not alone
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_opened_to_others_is_closed_when_it_is_read(own: Store) -> None:
    own.write("tuned", "a", PAYLOAD)
    assert own.folder is not None
    own.folder.chmod(0o777)
    assert own.read("tuned", "a") == PAYLOAD
    assert stat.S_IMODE(own.folder.stat().st_mode) == 0o700


# --- a disk that refuses ---------------------------------------------------------------------------------------------

STEPS = ("mkdir", "stat", "open", "scandir", "replace", "unlink", "chmod", "fdopen", "close", "fstat")
REFUSALS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE)


def _refusing(step: str, number: int, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Let the `number`-th call of an os function fail; whether it was reached."""
    real, count = getattr(os, step), [0]

    def refuse(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            if step == "close":
                real(*args, **kwargs)  # the system has closed it all the same
            raise OSError(code, os.strerror(code), str(folder))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, step, refuse)
    return lambda: count[0] >= number


@pytest.mark.parametrize("code", REFUSALS, ids=[errno.errorcode[code] for code in REFUSALS])
@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_refuses_costs_the_entry_alone(
    step: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each call of each function of the system fails in turn, on a cold folder and on a warm one."""
    reached = 0
    for warm in (False, True):
        for number in range(1, 8):
            own = Store(tmp_path / f"{step}-{warm}-{number}" / "v1")
            assert own.folder is not None
            if warm:
                own.write("tuned", "a", PAYLOAD)
            caplog.clear()
            with monkeypatch.context() as patched:
                was_reached = _refusing(step, number, code, own.folder, patched)
                own.write("tuned", "a", {"new": True})
                found = own.read("tuned", "a")
                own.entries()
                with own.alone(0.0):
                    pass
                own.clear()
                reached += was_reached()
            assert found in (None, PAYLOAD, {"new": True})
            assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) <= 1
            assert own.write("tuned", "a", PAYLOAD)
            assert own.read("tuned", "a") == PAYLOAD
            assert not [item for item in own.folder.iterdir() if item.name.startswith(".part-")] or step == "unlink"
    assert reached or step in ("chmod",)


def test_a_write_that_runs_out_of_space_leaves_what_was_there(own: Store) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full")
    own.write("tuned", "a", PAYLOAD)
    with pytest.MonkeyPatch.context() as patched:
        real = os.fdopen

        def filling(handle: int, mode: str) -> Any:
            os.close(handle)
            return real(os.open(full, os.O_WRONLY), mode)

        patched.setattr(os, "fdopen", filling)
        assert not own.write("tuned", "a", {"new": True})
    assert own.read("tuned", "a") == PAYLOAD


def test_a_folder_that_is_read_only(own: Store) -> None:
    own.write("tuned", "a", PAYLOAD)
    assert own.folder is not None
    if os.getuid() == 0:
        pytest.skip("nothing is read-only for root; a disk that refuses is tried above")
    own.folder.chmod(0o500)
    try:
        assert own.read("tuned", "a") == PAYLOAD
        assert not own.write("tuned", "b", PAYLOAD)
    finally:
        own.folder.chmod(0o700)


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_the_oldest_go_first(own: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNC_CACHE_LIMIT", "1")
    assert limit() == 1 << 20
    large = {"x": "y" * 90_000}
    for i in range(20):
        assert own.write("tuned", f"n{i:02}", large)
        os.utime(file_of(own, f"n{i:02}"), (i, i))
    entries = own.entries()
    assert sum(entry.bytes for entry in entries) <= 1 << 20
    assert [entry.name for entry in entries] == [f"n{i:02}" for i in range(20 - len(entries), 20)]
    assert len(entries) >= 7


def test_what_dead_processes_left_goes(own: Store) -> None:
    own.write("tuned", "a", PAYLOAD)
    assert own.folder is not None
    for name, age in ((".part-old", 7200), (".part-new", 0)):
        (own.folder / name).write_text("half an ent")
        os.utime(own.folder / name, (time.time() - age,) * 2)
    own.write("tuned", "b", PAYLOAD)
    assert sorted(path.name for path in own.folder.glob(".part-*")) == [".part-new"]
    (own.folder / "notes.txt").write_text("mine")
    assert own.clear() == 2
    assert sorted(path.name for path in own.folder.iterdir() if path.name != ".lock") == ["notes.txt"]


# --- several at once -------------------------------------------------------------------------------------------------


def test_one_is_alone(own: Store) -> None:
    """Threads, each with a handle of its own, exclude one another as processes do."""
    inside, most, lock = [0], [0], threading.Lock()

    def work() -> None:
        with own.alone(10.0) as alone:
            assert alone
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    with own.alone(1.0) as first, own.alone(0.05) as second:
        assert (first, second) == (True, False)


def test_the_lock_is_that_of_filelock(own: Store) -> None:
    """So that it locks on every system that filelock knows, Windows among them, and other programs can join."""
    with own.alone(0.0) as alone:
        assert alone
        assert own.folder is not None
        with pytest.raises(Timeout), FileLock(own.folder / ".lock", timeout=0):
            pass
    with FileLock(own.folder / ".lock", timeout=0), own.alone(0.0) as alone:
        assert not alone
    assert "fcntl" not in Path(inspect.getfile(Store)).read_text(encoding="utf-8")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_of_a_fork_locks_nobody_out(own: Store) -> None:
    with own.alone(0.0) as alone:
        assert alone
        child = os.fork()
        if not child:
            time.sleep(5)
            os._exit(0)
    try:
        with own.alone(0.0) as again:
            assert again
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- where it is -----------------------------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNC_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "v1"
    monkeypatch.setenv("ATTNC_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "attnc" / "v1"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "attnc" / "v1"
    assert store().folder == cache_folder()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
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
def test_limits_that_are_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNC_CACHE_LIMIT", text)
    assert limit() == 64 << 20


def test_a_process_in_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for variable in ("ATTNC_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "relative-to-nothing")
    assert cache_folder() is None
    assert triton_folder() == Path("relative-to-nothing")
    assert store().read("tuned", "a") is None
    guard_triton()


def test_the_same_payload_is_the_same_bytes() -> None:
    a = wrapped("tuned", "a", {"x": 1, "y": {"p": 1, "q": 2}})
    assert a == wrapped("tuned", "a", {"y": {"q": 2, "p": 1}, "x": 1})
    assert unwrapped("tuned", "a", a) == {"x": 1, "y": {"p": 1, "q": 2}}
