"""`attnc explain`: what the code of a diagnostic means, with an example."""

from __future__ import annotations

import argparse

from attnc.runtime.commands import console
from attnc.spec.codes import CODES
from attnc.spec.explain import page
from attnc.spec.suggest import did_you_mean


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `explain`."""
    parser.add_argument("code", metavar="CODE", nargs="?", help="such as A201; left out, all codes are listed")


def run(args: argparse.Namespace) -> int:
    """2 for a code that there is none of."""
    if args.code is None:
        return _list(as_json=args.json)
    code = args.code.upper().removeprefix("ERROR").removeprefix("WARNING").strip("[]")
    text = page(code)
    if text is None:
        near = did_you_mean(code, CODES)
        raise console.UsageError(f"there is no code `{code}`{': ' + near if near else ''}; `attnc explain` lists them")
    if args.json:
        console.print_json({"code": code, "title": CODES[code], "page": text})
    else:
        print(text, end="")
    return console.FINE


def _list(*, as_json: bool) -> int:
    if as_json:
        console.print_json({"codes": CODES})
    else:
        for code, title in CODES.items():
            print(f"{code}  {title}")
    return console.FINE
