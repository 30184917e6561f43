"""Render diagnostics as text for people and as data for programs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

from attnc.spec.diagnostics import Diagnostic, Label, Severity
from attnc.spec.source import SourceFile

_WIDTH = 120
"""Maximum number of characters of a source line that is shown whole."""
_BEFORE = 40
"""Number of characters of a clipped line before the caret."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")

_COLORS = {"error": "\x1b[1;31m", "warning": "\x1b[1;33m", "frame": "\x1b[1;34m", "strong": "\x1b[1m"}
_PLAIN = "\x1b[0m"

Paint = Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class _Mark:
    """One underlined part of a source line, with its phrase."""

    source: SourceFile
    line: int
    start: int
    end: int
    text: str
    primary: bool


def to_json(diagnostic: Diagnostic) -> dict[str, str | int]:
    """Return the fields of a diagnostic that the command line documents."""
    span = diagnostic.primary.span
    return {
        "code": diagnostic.code,
        "severity": diagnostic.severity.value,
        "message": diagnostic.message,
        "file": span.source.name,
        "line": span.line,
        "column": span.column,
        "help": diagnostic.help,
    }


def render(diagnostic: Diagnostic, *, color: bool = False) -> str:
    """Return a diagnostic as lines: message, position, source lines with carets, remedy. No final line end."""
    paint = _in_color if color else _in_plain
    span = diagnostic.primary.span
    marks = [_mark(diagnostic.primary, True), *(_mark(label, False) for label in diagnostic.secondary)]
    margin = " " * len(str(max(mark.line for mark in marks)))
    severity = diagnostic.severity.value
    lines = [
        paint(severity, f"{severity}[{diagnostic.code}]") + paint("strong", f": {_clean(diagnostic.message)}"),
        f"{margin}{paint('frame', '-->')} {_place(span.source, span.line, span.column)}",
        *_excerpts(marks, margin, diagnostic.severity, paint),
    ]
    if diagnostic.help:
        lines.append(f"{paint('strong', 'help')}: {_clean(diagnostic.help)}")
    return "\n".join(lines)


def _in_plain(style: str, text: str) -> str:
    return text


def _in_color(style: str, text: str) -> str:
    return f"{_COLORS[style]}{text}{_PLAIN}"


def _mark(label: Label, primary: bool) -> _Mark:
    span = label.span
    length = len(span.source.line(span.line))
    start = max(0, min(span.column - 1, length))
    # A span over several lines is underlined to the end of its first line; an empty span gets one caret.
    end = max(start + 1, min(start + span.end - span.start, length))
    return _Mark(span.source, span.line, start, end, label.text, primary)


def _excerpts(marks: list[_Mark], margin: str, severity: Severity, paint: Paint) -> Iterator[str]:
    """Yield the marked source lines in order, the file of the primary mark first."""
    first = marks[0].source
    ordered = sorted(marks, key=lambda m: (m.source is not first, m.source.name, m.line, not m.primary, m.start))
    bar = paint("frame", "|")
    source, line = first, 0
    yield f"{margin} {bar}"
    for (mark_source, number), marks_of_line in groupby(ordered, key=lambda m: (m.source, m.line)):
        marked = list(marks_of_line)
        if mark_source is not source:
            yield f"{margin}{paint('frame', ':::')} {_place(mark_source, number, marked[0].start + 1)}"
            yield f"{margin} {bar}"
        elif line and number > line + 1:
            yield f"{margin} {paint('frame', ':')}"
        source, line = mark_source, number
        yield from _excerpt(marked, margin, severity, paint)


def _excerpt(marks: list[_Mark], margin: str, severity: Severity, paint: Paint) -> Iterator[str]:
    """Yield a source line, and a line of carets for each of its marks."""
    bar = paint("frame", "|")
    text = marks[0].source.line(marks[0].line)
    low, high = _window(text, marks[0].start)
    before, after = "…" if low else "", "…" if high < len(text) else ""
    number = paint("frame", str(marks[0].line).rjust(len(margin)))
    yield f"{number} {bar} {before}{_clean(text[low:high])}{after}".rstrip()
    inside = [mark for mark in marks if low <= mark.start <= high]
    for mark in inside:
        gap = " " * (len(before) + _columns(text[low : mark.start]))
        line = ("^" if mark.primary else "-") * max(1, _columns(text[mark.start : min(mark.end, high)]))
        phrase = f" {_clean(mark.text)}" if mark.text else ""
        yield f"{margin} {bar} {gap}{paint(severity.value if mark.primary else 'frame', line + phrase)}"
    outside = [mark for mark in marks if mark not in inside]
    if outside:
        yield from _excerpt(outside, margin, severity, paint)


def _window(text: str, caret: int) -> tuple[int, int]:
    if len(text) <= _WIDTH:
        return 0, len(text)
    low = max(0, min(caret - _BEFORE, len(text) - _WIDTH))
    return low, low + _WIDTH


def _place(source: SourceFile, line: int, column: int) -> str:
    return f"{_clean(source.name)}:{line}:{column}"


def _clean(text: str) -> str:
    """Return the text with control characters replaced, so that a terminal shows them; keeps the length."""
    return _UNPRINTABLE.sub("\ufffd", text)


def _columns(text: str) -> int:
    """Return the number of terminal cells that the text takes."""
    return sum(_cells(character) for character in _clean(text))


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
