"""`attnc cache`: what is kept on disk."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from attnc.runtime.commands import console


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `cache`."""
    parser.add_argument("what", choices=["load"], help="put a file of `attnc emit --binaries` into Triton's cache")
    parser.add_argument("file", metavar="FILE.zip", type=Path)


def run(args: argparse.Namespace) -> int:
    """2 for a file that cannot be loaded here."""
    from attnc.runtime.gpu.binaries import load_binaries

    manifest = load_binaries(args.file)
    if args.json:
        console.print_json({"file": str(args.file), "loaded": asdict(manifest)})
    else:
        print(f"{args.file}: loaded {manifest}")
    return console.FINE
