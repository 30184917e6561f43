"""Exit statuses, messages, colour and JSON output for all commands."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from attnc.runtime.process.environment import wants_plain_text
from attnc.spec.diagnostics import Diagnostic, Severity
from attnc.spec.errors import SpecError
from attnc.spec.render import render, to_json

FINE, FOUND, USAGE = 0, 1, 2
"""Exit statuses: success; an error or a difference was found; bad usage, or undecided."""

SCHEMA = 1
"""The version of the schema of `--json` output."""


class UsageError(Exception):
    """A command line that cannot be run. The message says what to write instead."""


def has_color(stream: TextIO) -> bool:
    """Whether to colour output to a stream: only on a terminal, and only if the user allows it (NO_COLOR)."""
    return stream.isatty() and not wants_plain_text()


def has_unicode(stream: TextIO) -> bool:
    """Whether a stream can show more than ASCII."""
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")


def columns() -> int:
    """Return the width of the terminal in characters; 100 where it is unknown."""
    return shutil.get_terminal_size((100, 24)).columns


def print_json(values: Mapping[str, object]) -> None:
    """Print one JSON object to stdout, with the version of the schema first."""
    print(json.dumps({"schema": SCHEMA, **values}, ensure_ascii=not has_unicode(sys.stdout), indent=2))


def print_answer(args: argparse.Namespace, values: Mapping[str, object], text: str) -> None:
    """Print the answer of a command: JSON if the arguments ask for it, else text."""
    if args.json:
        print_json(values)
    else:
        print(text)


def check_at_least(least: int, *options: tuple[str, int | None]) -> None:
    """Raise UsageError for an option whose value is below `least`."""
    for option, value in options:
        if value is not None and value < least:
            raise UsageError(f"{option} {value}: give a whole number, at least {least}")


def add_repeated(parser: argparse.ArgumentParser, option: str, dest: str, metavar: str, text: str, **more: Any) -> None:
    """Add an option that may be repeated; its values are a list, which is empty without the option."""
    parser.add_argument(option, dest=dest, metavar=metavar, action="append", default=[], help=text, **more)


def print_error(message: str) -> None:
    """Print a message about the command line or a call to stderr."""
    mark = "\x1b[1;31merror\x1b[0m" if has_color(sys.stderr) else "error"
    print(f"{mark}: {message}", file=sys.stderr)


def print_diagnostics(diagnostics: Iterable[Diagnostic], unread: Iterable[dict[str, object]] = ()) -> None:
    """Print rendered diagnostics to stderr, with a blank line after each, then the errors of `read_each`."""
    color = has_color(sys.stderr)
    for diagnostic in diagnostics:
        print(f"{render(diagnostic, color=color)}\n", file=sys.stderr)
    for message in unread:
        print_error(str(message["message"]))


def diagnostics_json(diagnostics: Iterable[Diagnostic]) -> list[dict[str, str | int]]:
    """Return diagnostics with the JSON keys that the command line promises."""
    return [to_json(diagnostic) for diagnostic in diagnostics]


def message_json(message: str, file: str | None = None) -> dict[str, object]:
    """Return an error without a position in a text, with the JSON keys of a diagnostic."""
    keys: dict[str, object] = {"code": None, "severity": "error", "message": message}
    return {**keys, "file": file, "line": None, "column": None, "help": ""}


def read_each(
    files: Iterable[str], read: Callable[[str], Iterable[Diagnostic]]
) -> tuple[list[Diagnostic], list[dict[str, object]]]:
    """Read files in order; return what `read` returns or raises as diagnostics, and the errors of unreadable files.

    Errors have the JSON keys of a diagnostic.
    """
    diagnostics: list[Diagnostic] = []
    unread = []
    for name in files:
        try:
            diagnostics.extend(read(name))
        except SpecError as error:
            diagnostics.extend(error.diagnostics)
        except (OSError, UsageError) as error:
            reason = str(error) if isinstance(error, UsageError) else error.strerror or type(error).__name__
            unread.append(message_json(f"{name}: {reason}", name))
    return diagnostics, unread


def read_file(name: str) -> bytes:
    """Return the bytes of a file. Raises OSError, and UsageError for a folder."""
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"is a directory; name the files in it, as in {path / '*.attn'}")
    return path.read_bytes()


class ProgressStep(Protocol):
    """Reports a step of a long computation. `done`: the number of steps done; one more than before if it is omitted."""

    def __call__(self, text: str, done: int | None = None) -> None:
        """Report the step."""


@contextmanager
def progress(name: str, total: int) -> Iterator[ProgressStep]:
    """Report each step: by a bar where rich is installed and the terminal takes escape codes, else by lines.

    Print nothing where stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield lambda text, done=None: None
        return
    rich_classes = _rich() if has_color(sys.stderr) else None
    if rich_classes is None:
        yield lambda text, done=None: print(f"{name}: {text}", file=sys.stderr)
        return
    Console, Progress = rich_classes
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total + 1)

        def step(text: str, done: int | None = None) -> None:
            bar.update(task, advance=1 if done is None else None, completed=done, description=text)

        yield step


def _rich() -> tuple[Any, Any] | None:
    """Return rich's console and progress bar classes, or None where rich is not installed."""
    try:
        from rich.console import Console  # optional
        from rich.progress import Progress  # optional
    except ImportError:
        return None
    return Console, Progress


def counted(n: int, noun: str) -> str:
    """Return a number with its noun: `1 error`, `2 errors`, `no errors`, `no entries`."""
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{n or 'no'} {noun if n == 1 else several}"


def has_errors(diagnostics: Iterable[Diagnostic]) -> bool:
    """Whether any diagnostic is an error."""
    return any(d.severity is Severity.ERROR for d in diagnostics)
