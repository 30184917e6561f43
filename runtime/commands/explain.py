"""`attnc explain`: explain the code of a diagnostic with an example, or how a recurrence is compiled."""

from __future__ import annotations

import argparse

from attnc.runtime.commands import console
from attnc.runtime.commands.patterns import add_parameters, compiled
from attnc.runtime.texts.library import library_names
from attnc.spec.codes import CODES, page
from attnc.spec.suggest import did_you_mean


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `explain`."""
    parser.add_argument(
        "code", metavar="CODE", nargs="?", help="the code of a message, such as A201; without it, all codes are listed"
    )
    parser.add_argument(
        "--derivation", dest="spec", metavar="SPEC", help="explain instead how this recurrence is compiled"
    )
    add_parameters(parser)


def run(args: argparse.Namespace) -> int:
    """Print the explanation and return the exit status. Raises UsageError for an unknown code."""
    if args.spec is not None:
        return _derivation(args)
    if args.code is None:
        console.print_answer(args, {"codes": CODES}, "\n".join(f"{code}  {title}" for code, title in CODES.items()))
        return console.FINE
    code = args.code.upper().removeprefix("ERROR").removeprefix("WARNING").strip("[]")
    text = page(code)
    if text is None:
        if args.code in library_names():
            raise console.UsageError(f"`{args.code}` is a pattern, not a code: `attnc show {args.code}` draws it")
        near = did_you_mean(code, CODES)
        raise console.UsageError(
            f"there is no code `{code}`{': ' + near if near else ''}; `attnc explain` lists all codes"
        )
    console.print_answer(args, {"code": code, "title": CODES[code], "page": text}, text.removesuffix("\n"))
    return console.FINE


def _derivation(args: argparse.Namespace) -> int:
    """Print the passes of a recurrence, or why it runs token by token."""
    if args.code is not None:
        raise console.UsageError(f"{args.code} and --derivation cannot be combined; use one or the other")
    attention = compiled(args)
    text = attention.derivation()
    console.print_answer(args, {"pattern": attention.name, "derivation": text}, text)
    return console.FINE
