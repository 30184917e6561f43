"""`attnc check`: report errors and warnings in `.attn` files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attnc.runtime.commands import console
from attnc.runtime.texts.diagnosis import diagnosed
from attnc.runtime.texts.library import ModuleLoader, library_names
from attnc.spec.diagnostics import Diagnostic, Severity
from attnc.spec.reading.source_text import decode


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check`."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="an .attn file; - reads standard input")


def run(args: argparse.Namespace) -> int:
    """Print what is wrong and return the exit status: 1 if a file has an error, 2 if a file cannot be read."""
    diagnostics, unread = console.read_each(args.files, _check)
    if args.json:
        console.print_json({"diagnostics": [*console.diagnostics_json(diagnostics), *unread]})
    else:
        console.print_diagnostics(diagnostics, unread)
        if len(unread) < len(args.files):
            print(_summary(len(args.files) - len(unread), diagnostics, len(unread)))
    return console.USAGE if unread else console.FOUND if console.has_errors(diagnostics) else console.FINE


def _check(name: str) -> tuple[Diagnostic, ...]:
    """Return all errors and warnings of a file. Raises OSError, SpecError, UsageError."""
    path = Path(name)
    if name == "-":
        return diagnosed(decode(sys.stdin.buffer.read(), "<stdin>"), ModuleLoader(Path()))
    if not path.exists() and name in library_names():
        raise console.UsageError(f"no such file; `attnc show {name}` draws the library's pattern of that name")
    return diagnosed(decode(console.read_file(name), name), ModuleLoader(path.parent))


def _summary(files: int, diagnostics: list[Diagnostic], unread: int) -> str:
    errors = sum(d.severity is Severity.ERROR for d in diagnostics)
    warnings = len(diagnostics) - errors
    parts = [console.counted(files, "file") + " checked", console.counted(errors, "error")]
    if warnings:
        parts.append(console.counted(warnings, "warning"))
    if unread:
        parts[1] = f"{parts[1]} in {'it' if files == 1 else 'them'}"
        parts.append(f"{console.counted(unread, 'file')} not read")
    return ", ".join(parts)
