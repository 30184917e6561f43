"""Decode bytes to a `SourceFile`, and check the text once, so that later stages see clean lines."""

from __future__ import annotations

import re

from attnc.spec.diagnostics import Diagnostic, Label
from attnc.spec.errors import SpecError
from attnc.spec.reading.limits import MAX_TEXT_BYTES
from attnc.spec.source import SourceFile, Span

_BYTE_ORDER_MARK = "\ufeff"
_CONTROL = r"\x00-\x09\x0b-\x1f\x7f-\x9f"
_INVISIBLE = r"\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"
_SUSPECT = re.compile(rf"[{_CONTROL}{_INVISIBLE}\ud800-\udfff]")
_CONTENT = re.compile(r"^ *[^ #\n]", re.MULTILINE)
_SHOWN_OF_TOO_LARGE = 200


def decode(data: bytes | str, name: str) -> SourceFile:
    """Return the checked text of `data`, without a byte-order mark and with LF line ends.

    Raises `SpecError` for a text that is empty, too large or not UTF-8, or that holds tabs, control characters or
    invisible characters.
    """
    _refuse_too_large(data, name)
    text = (data if isinstance(data, str) else _utf8(data, name)).removeprefix(_BYTE_ORDER_MARK).replace("\r\n", "\n")
    source = SourceFile(name, text)
    suspect = _SUSPECT.search(text)
    if suspect:
        raise _error(source, suspect.start(), *_describe(suspect.group()))
    if not _CONTENT.search(text):
        raise _error(source, 0, "A001", "the text is empty", "write a `pattern`, a `recurrence` or a `def`")
    return source


def _refuse_too_large(data: bytes | str, name: str) -> None:
    """Raise `SpecError` for a text that is too large; looks only at its size and its first characters."""
    size = len(data)
    if isinstance(data, str) and size <= MAX_TEXT_BYTES:
        size = len(data.encode("utf-8", "replace"))
    if size <= MAX_TEXT_BYTES:
        return
    start = data[:_SHOWN_OF_TOO_LARGE]
    shown = start if isinstance(start, str) else start.decode("utf-8", "replace")
    raise _error(
        SourceFile(name, shown),
        0,
        "A501",
        f"the text is larger than the limit of {MAX_TEXT_BYTES:,} bytes",
        "move large tables into an `input` tensor",
    )


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        # The bytes before the fault are valid, so their decoded length is the position of the fault in characters.
        before = data[: error.start].decode("utf-8").removeprefix(_BYTE_ORDER_MARK).replace("\r\n", "\n")
        source = SourceFile(name, before + "\ufffd")
        raise _error(
            source,
            len(before),
            "A002",
            f"the text is not UTF-8: byte 0x{data[error.start]:02x} cannot stand here",
            "save the file as UTF-8; a binary file is not a pattern",
        ) from None


def _describe(character: str) -> tuple[str, str, str]:
    """Return (code, message, help) for a character that a text must not hold."""
    point = f"U+{ord(character):04X}"
    if character == "\t":
        return "A004", "tabs are not allowed: their width is undefined", "indent and align with spaces"
    if character == "\r":
        return "A005", "a carriage return without a line feed", "end lines with LF or CRLF"
    if "\ud800" <= character <= "\udfff":
        return "A002", f"the text is not Unicode: it holds the lone surrogate {point}", "decode the text as UTF-8 first"
    if character < " " or "\x7f" <= character <= "\x9f":
        return "A003", f"the control character {point} is not allowed", "remove it; a binary file is not a pattern"
    return "A006", f"the invisible character {point} is not allowed", "remove it"


def _error(source: SourceFile, offset: int, code: str, message: str, remedy: str) -> SpecError:
    return SpecError((Diagnostic(code, message, Label(Span(source, offset, offset + 1)), help=remedy),))
