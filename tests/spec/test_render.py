"""Diagnostics as text and as data."""

from __future__ import annotations

import re

from attnc.spec.diagnostics import Diagnostic, Label, Severity
from attnc.spec.render import render, to_json
from attnc.spec.source import SourceFile, Span

SOURCE = SourceFile("a.attn", "pattern p\n    visible x\n    score y\n\n    read zz\n")


def at(text: str, source: SourceFile = SOURCE) -> Span:
    start = source.text.index(text)
    return Span(source, start, start + len(text))


def test_a_diagnostic_with_every_field() -> None:
    other = SourceFile("b.attn", "let y = 1\n")
    secondary = (Label(at("zz"), "and this"), Label(at("score"), "this"), Label(at("y", other), "defined here"))
    diagnostic = Diagnostic("A100", "a message", Label(at("x"), "here"), secondary, "do that")
    assert (
        render(diagnostic)
        == """\
error[A100]: a message
 --> a.attn:2:13
  |
2 |     visible x
  |             ^ here
3 |     score y
  |     ----- this
  :
5 |     read zz
  |          -- and this
 ::: b.attn:1:5
  |
1 | let y = 1
  |     - defined here
help: do that"""
    )


def test_two_labels_on_one_line() -> None:
    diagnostic = Diagnostic("A100", "m", Label(at("visible"), "a"), (Label(at("x"), "b"),))
    assert render(diagnostic).splitlines()[3:] == ["2 |     visible x", "  |     ^^^^^^^ a", "  |             - b"]


def test_margin_fits_the_largest_number() -> None:
    source = SourceFile("a.attn", "a\n" * 99 + "bad\n")
    diagnostic = Diagnostic("A100", "m", Label(at("bad", source)), (Label(Span(source, 0, 1)),))
    lines = render(diagnostic).splitlines()
    assert lines[1:] == ["   --> a.attn:100:1", "    |", "  1 | a", "    | -", "    :", "100 | bad", "    | ^^^"]


def test_a_span_over_lines_is_marked_to_the_end_of_the_first() -> None:
    diagnostic = Diagnostic("A100", "m", Label(Span(SOURCE, at("visible").start, at("zz").end)))
    assert render(diagnostic).splitlines()[-1] == "  |     ^^^^^^^^^"


def test_the_end_of_the_text_and_the_empty_text_have_a_caret() -> None:
    end = len(SOURCE.text)
    assert render(Diagnostic("A100", "m", Label(Span(SOURCE, end, end)))).splitlines()[-2:] == ["6 |", "  | ^"]
    empty = SourceFile("e.attn", "")
    assert render(Diagnostic("A100", "m", Label(Span(empty, 0, 1)))).splitlines()[-2:] == ["1 |", "  | ^"]


def test_wide_characters_keep_the_caret_in_place() -> None:
    source = SourceFile("a.attn", "注意 é e\u0301 bad")
    line, caret = render(Diagnostic("A100", "m", Label(at("bad", source)))).splitlines()[-2:]
    assert caret == "  | " + " " * 9 + "^^^"  # two wide characters take four cells, a combining mark none
    assert line.endswith("bad")


def test_long_lines_are_clipped_around_the_caret() -> None:
    source = SourceFile("a.attn", "x" * 5_000_000 + "bad" + "y" * 5_000_000)
    text = render(Diagnostic("A100", "m", Label(at("bad", source), "here")))
    line, caret = text.splitlines()[-2:]
    assert len(text) < 500
    assert line[caret.index("^") :].startswith("bad")
    assert line.startswith("1 | …x") and line.endswith("y…")
    start = Diagnostic("A100", "m", Label(Span(source, 0, 10_000_003)))
    assert len(render(start)) < 500
    far = Diagnostic("A100", "m", Label(Span(source, 0, 1)), (Label(at("bad", source), "there"),))
    assert len(render(far)) < 500


def test_terminal_control_characters_are_escaped() -> None:
    source = SourceFile("\x1b]0;a.attn", "a\x1b[31m\tb\u202e\x00\n")
    text = render(Diagnostic("A100", "m\x07", Label(Span(source, 0, 3), "\x1b[0m"), help="\x9b"))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_color_adds_color_only() -> None:
    diagnostic = Diagnostic("W001", "m", Label(at("x"), "here"), (Label(at("score")),), "h", Severity.WARNING)
    colored = render(diagnostic, color=True)
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == render(diagnostic)
    assert render(diagnostic).startswith("warning[W001]: m\n")


def test_json() -> None:
    diagnostic = Diagnostic("A100", "m", Label(at("x")), (), "h")
    assert to_json(diagnostic) == {
        "code": "A100",
        "severity": "error",
        "message": "m",
        "file": "a.attn",
        "line": 2,
        "column": 13,
        "help": "h",
    }
