"""Terminals and locales that show only ASCII: every symbol has a plain counterpart, and none is printed as `?`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from attnc.runtime.cli import main
from attnc.runtime.process import ascii_text

COMMANDS = [
    ["show", "causal", "--len", "64"],
    ["show", "causal", "--tiles", "--len", "1024"],
    ["simulate", "sliding_window", "--len", "8192"],
    ["explain", "A401"],
    ["check", "bad.attn"],
    ["--help"],
]


def printed(arguments: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Return the exit code of a command and the text that it prints to streams of this encoding."""
    buffers = [io.BytesIO(), io.BytesIO()]
    with monkeypatch.context() as patch:
        for name, buffer in zip(("stdout", "stderr"), buffers, strict=True):
            patch.setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding, write_through=True))
        status = main(arguments)
        return status, "".join(buffer.getvalue().decode(encoding) for buffer in buffers)


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: "-".join(arguments[:2]))
def test_no_character_becomes_a_question_mark(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.attn").write_text("pattern p\n    # ≤ ж\n    visible q <= k and ж < 2\n", encoding="utf-8")
    want, wide = printed(arguments, "utf-8", monkeypatch)
    status, narrow = printed(arguments, "ascii", monkeypatch)
    assert status == want
    assert narrow.isascii() and narrow
    assert narrow.count("?") == wide.count("?")


def test_json_is_the_same_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = (printed(["explain", "A107", "--json"], encoding, monkeypatch)[1] for encoding in ("utf-8", "ascii"))
    assert not wide.isascii()
    assert json.loads(narrow) == json.loads(wide)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a · b", "a - b"),
        ("O(n·w)", "O(n*w)"),
        ("2 × 3 ≤ 7 … → 628 µs", "2 x 3 <= 7 ... > 628 us"),
        ("naïve", "naive"),
        ("ж", "\\u0436"),
        ("10⁻²", "10^-^2"),
    ],
)
def test_marks_have_plain_counterparts(text: str, want: str) -> None:
    assert ascii_text.plain(text) == want
    assert text.encode("ascii", ascii_text.HANDLER).decode() == want
