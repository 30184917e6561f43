"""Triton's cache: named, created private before Triton creates it, with a warning if other users can write to it."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnc.runtime.disk import triton
from attnc.runtime.disk.triton import guard_triton, triton_folder, triton_state


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "home" / "kernels"))
    triton._guard.cache_clear()
    yield tmp_path / "home" / "kernels"
    triton._guard.cache_clear()


def test_the_location_of_tritons_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert triton_folder() == folder
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert triton_folder() == tmp_path / ".triton" / "cache"
    monkeypatch.delenv("TRITON_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert triton_folder() == Path("/home/a/.triton/cache")


def test_triton_uses_this_folder(folder: Path) -> None:
    cache = pytest.importorskip("triton.runtime.cache")
    manager = cache.get_cache_manager("a77c")
    assert Path(manager.cache_dir).parent == triton_folder()


def test_the_folder_is_created_private(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert triton_state(folder) == "not created yet"
    before = os.umask(0)
    try:
        guard_triton()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert triton_state(folder) == "only the user can write"
    assert not caplog.records


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_folder_writable_by_others_warns_once(mode: int, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.mkdir(parents=True)
    folder.chmod(mode)
    for _ in range(3):
        guard_triton()
    (warned,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "chmod go-w" in warned.getMessage()
    assert "others may write there" in triton_state(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == mode, "it stays Triton's"


def test_a_folder_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard_triton()
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    folder.chmod(0o755)
    state = triton_state(folder)
    assert state == (
        "only the user can write" if owner == 0 else "it belongs to another user, whose kernels would run here"
    )


def test_a_failing_disk_is_harmless(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")
    guard_triton()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/no/such/folder")
    guard_triton()
    assert "not created yet" in triton_state(triton_folder()) or "cannot be read" in triton_state(triton_folder())
