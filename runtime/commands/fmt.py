"""`attnc fmt`: `.attn` files in their one form."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attnc.runtime.commands import console
from attnc.runtime.disk.whole import write_for_user
from attnc.spec.diagnostics import Diagnostic
from attnc.spec.errors import SpecError
from attnc.spec.formatting import formatted
from attnc.spec.reading.source_text import decode


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fmt`."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="an .attn file; - reads stdin and writes stdout")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file has another form")


def run(args: argparse.Namespace) -> int:
    """1 where a file is no text of the language or, with `--check`, has another form; 2 where one cannot be read."""
    changed: list[str] = []
    diagnostics: list[Diagnostic] = []
    unread: list[dict[str, object]] = []
    for name in args.files:
        try:
            if _format(name, check=args.check):
                changed.append(name)
        except SpecError as error:
            diagnostics.extend(error.diagnostics)
        except (OSError, console.UsageError) as error:
            unread.append(console.unread_json(name, error))
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
    console.print_diagnostics(diagnostics)
    for message in unread:
        console.print_error(str(message["message"]))
    if "-" in args.files and not args.check:
        return  # stdout is the text
    for name in changed:
        print(f"{name}: {'has another form' if args.check else 'written'}")
    done = len(args.files) - len(unread)
    if done:
        verb = "would change" if args.check else "changed"
        print(f"{console.counted(done, 'file')} read, {len(changed)} {verb}")


def _format(name: str, *, check: bool) -> bool:
    """Whether the text had another form; it is written unless only checked. Raises OSError, SpecError, UsageError."""
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
