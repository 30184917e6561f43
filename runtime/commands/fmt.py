"""`attnc fmt`: format `.attn` files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attnc.runtime.commands import console
from attnc.runtime.disk.whole import write_for_user
from attnc.spec.diagnostics import Diagnostic
from attnc.spec.formatting import formatted
from attnc.spec.reading.source_text import decode


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fmt`."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="an .attn file; - reads stdin and writes stdout")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with status 1 if a file is not formatted"
    )


def run(args: argparse.Namespace) -> int:
    """Format the files and return the exit status.

    1 if a file has an error or, with `--check`, is not formatted; 2 if a file cannot be read.
    """
    changed: list[str] = []

    def read(name: str) -> tuple[Diagnostic, ...]:
        if _format(name, check=args.check):
            changed.append(name)
        return ()

    diagnostics, unread = console.read_each(args.files, read)
    _report(args, changed, diagnostics, unread)
    if unread:
        return console.USAGE
    return console.FOUND if diagnostics or (args.check and changed) else console.FINE


def _report(
    args: argparse.Namespace, changed: list[str], diagnostics: list[Diagnostic], unread: list[dict[str, object]]
) -> None:
    if args.json:
        console.print_json({"changed": changed, "diagnostics": [*console.diagnostics_json(diagnostics), *unread]})
        return
    console.print_diagnostics(diagnostics, unread)
    if "-" in args.files and not args.check:
        return  # stdout is the text
    for name in changed:
        print(f"{name}: {'is not formatted' if args.check else 'formatted'}")
    read_count = len(args.files) - len(unread)
    if read_count:
        verb = "would change" if args.check else "changed"
        print(f"{console.counted(read_count, 'file')} read, {len(changed)} {verb}")


def _format(name: str, *, check: bool) -> bool:
    """Format a file unless only checked; return whether it was not formatted. Raises OSError, SpecError, UsageError."""
    if name == "-":
        data = sys.stdin.buffer.read()
        text = formatted(decode(data, "<stdin>"))
        if not check:
            sys.stdout.write(text)
        return text.encode() != data
    path = Path(name)
    data = console.read_file(name)
    text = formatted(decode(data, name))
    if text.encode() == data:
        return False
    if not check:
        write_for_user(path, text.encode())
    return True
