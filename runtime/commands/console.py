"""Exit statuses, messages, colour and JSON output for all commands."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from attnc.runtime.environment import wants_plain_text
from attnc.spec.diagnostics import Diagnostic, Severity
from attnc.spec.render import render, to_json

FINE, FOUND, USAGE = 0, 1, 2
"""Exit statuses: fine; something is wrong, or different; bad usage, or undecidable."""

SCHEMA = 1
"""The version of what `--json` prints."""


class UsageError(Exception):
    """A command line that cannot be obeyed. The message says what to write instead."""


def has_color(stream: TextIO) -> bool:
    """Whether to colour what goes to a stream: terminals only, and not against the user's wish (NO_COLOR)."""
    return stream.isatty() and not wants_plain_text()


def has_unicode(stream: TextIO) -> bool:
    """Whether a stream can show more than ASCII."""
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")


def columns() -> int:
    """The width to write for."""
    return shutil.get_terminal_size((100, 24)).columns


def print_json(values: Mapping[str, object]) -> None:
    """One JSON object on stdout, with the schema's version first."""
    print(json.dumps({"schema": SCHEMA, **values}, ensure_ascii=not has_unicode(sys.stdout), indent=2))


def print_error(message: str) -> None:
    """A message about the command line or a call, on stderr."""
    mark = "\x1b[1;31merror\x1b[0m" if has_color(sys.stderr) else "error"
    print(f"{mark}: {message}", file=sys.stderr)


def print_diagnostics(diagnostics: Iterable[Diagnostic]) -> None:
    """Rendered diagnostics on stderr, a blank line after each."""
    color = has_color(sys.stderr)
    for diagnostic in diagnostics:
        print(f"{render(diagnostic, color=color)}\n", file=sys.stderr)


def diagnostics_json(diagnostics: Iterable[Diagnostic]) -> list[dict[str, str | int]]:
    """Diagnostics with the keys that the command line promises."""
    return [to_json(diagnostic) for diagnostic in diagnostics]


def message_json(message: str, file: str | None = None) -> dict[str, object]:
    """An error that has no place in a text, with the keys of a diagnostic."""
    keys: dict[str, object] = {"code": None, "severity": "error", "message": message}
    return {**keys, "file": file, "line": None, "column": None, "help": ""}


def unread_json(name: str, error: OSError | UsageError) -> dict[str, object]:
    """A file that could not be read, with the keys of a diagnostic."""
    reason = str(error) if isinstance(error, UsageError) else error.strerror or type(error).__name__
    return message_json(f"{name}: {reason}", name)


def read_file(name: str) -> bytes:
    """Return the bytes of a file. Raises OSError, and UsageError for a folder."""
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"is a directory; give the files in it, as in {path / '*.attn'}")
    return path.read_bytes()


class ProgressStep(Protocol):
    """Tells of a step of long work; `done`: how many there were, one more where it is left out."""

    def __call__(self, text: str, done: int | None = None) -> None:
        """Tell."""


@contextmanager
def progress(name: str, total: int) -> Iterator[ProgressStep]:
    """Tells of each step on a terminal: a bar where rich is installed and escape codes are wanted, else lines.

    Where there is no terminal, nothing.
    """
    if not sys.stderr.isatty():
        yield lambda text, done=None: None
        return
    found = _rich() if has_color(sys.stderr) else None
    if found is None:
        yield lambda text, done=None: print(f"{name}: {text}", file=sys.stderr)
        return
    Console, Progress = found
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total + 1)

        def step(text: str, done: int | None = None) -> None:
            bar.update(task, advance=1 if done is None else None, completed=done, description=text)

        yield step


def _rich() -> tuple[Any, Any] | None:
    """Its console and progress bar, where it is installed."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    return Console, Progress


def counted(n: int, noun: str) -> str:
    """`1 error`, `2 errors`, `no errors`, `no entries`."""
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{n or 'no'} {noun if n == 1 else several}"


def has_errors(diagnostics: Iterable[Diagnostic]) -> bool:
    """Whether one of them is an error."""
    return any(d.severity is Severity.ERROR for d in diagnostics)
