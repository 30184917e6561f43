"""The report's browser check, as far as it runs without a browser."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import report_check
from report_check import Browser, CheckError, attribute, driven, find_browser, main, moving_parts


@pytest.fixture
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["report_check.py"])
    return tmp_path


def test_a_missing_browser_is_reported(nothing_installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_browser() is None
    assert main() == 0
    assert "no Chromium is installed" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["chromium", "chromium-1200/chrome-linux/chrome", "google-chrome"])
def test_a_browser_is_found(nothing_installed: Path, place: str) -> None:
    path = nothing_installed / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    assert find_browser() == Browser(str(path))


def test_a_failing_browser_fails_the_check(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for path in (tmp_path / "absent", Path("/bin/false")):
        with pytest.raises(CheckError):
            Browser(str(path)).dom(page)


def test_a_page_whose_script_does_not_run_fails_the_check(
    nothing_installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(browser: Browser, folder: Path) -> str:
        raise CheckError("the script of report.html did not run")

    monkeypatch.setattr(report_check, "check", refused)
    monkeypatch.setattr(sys, "argv", ["report_check.py", "--browser", "any"])
    assert main() == 1
    assert "did not run" in capsys.readouterr().err


def test_attributes_and_moving_parts_are_read() -> None:
    dom = '<body class="x" data-ready="true" data-faults="a &amp; b"><section id="ladder" a="b">1</section></body>'
    assert (attribute(dom, "ready"), attribute(dom, "faults"), attribute(dom, "redraws")) == ("true", "a & b", None)
    assert moving_parts(dom) == {"ladder": "1"}


def test_the_driver_script_is_allowed() -> None:
    page = "<meta content=\"script-src 'sha256-own'\"><body></body>"
    changed = driven(page, [1, 2])
    assert changed.count("sha256-") == 2 and "move([1, 2])" in changed
