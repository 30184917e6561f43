"""`attnc list`: the patterns of the library."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from attnc.runtime.commands import console
from attnc.runtime.library import ModuleLoader, find, library_files, library_names
from attnc.spec.load import load_program
from attnc.spec.meaning.values import shown
from attnc.spec.program import Program

COLUMN = 48
"""Summaries stand in a column at most this far to the right; a longer call moves its own."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One pattern of the library."""

    program: Program
    file: Path

    @property
    def family(self) -> str:
        """The folder that it stands in."""
        return self.file.parent.name

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        text = " ".join(self.program.docstring.split("\n\n")[0].split())
        end = text.find(". ")
        return text if end < 0 else text[: end + 1]

    @property
    def call(self) -> str:
        """Its name with parameters and defaults."""
        parts = [p.name if p.default is None else f"{p.name} = {shown(p.default)}" for p in self.program.parameters]
        return f"{self.program.name}({', '.join(parts)})" if parts else self.program.name


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `list`: none of its own."""
    del parser


def run(args: argparse.Namespace) -> int:
    """Print the patterns by name."""
    entries = [Entry(_program(name), library_files()[name]) for name in library_names()]
    if args.json:
        console.print_json({"patterns": [_as_json(entry) for entry in entries]})
        return console.FINE
    width = max((len(entry.call) for entry in entries if len(entry.call) <= COLUMN), default=0)
    for entry in entries:
        print(f"{entry.call.ljust(width)}  {entry.summary}")
    return console.FINE


def _program(name: str) -> Program:
    found = find(name)
    return load_program(found.source, ModuleLoader(None), name)


def _as_json(entry: Entry) -> dict[str, object]:
    program = entry.program
    keys = {"name": program.name, "family": entry.family, "summary": entry.summary, "file": str(entry.file)}
    return {**keys, "inputs": [i.name for i in program.inputs], "presets": [p.name for p in program.presets]}
