"""Fixtures shared by the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_calls import BAD, GOOD


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a working directory with one valid and one invalid file, in a terminal of 120 columns."""
    (tmp_path / "good.attn").write_text(GOOD)
    (tmp_path / "bad.attn").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path
