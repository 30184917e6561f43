"""`attnc list`: the patterns of the library by family, all of them or those that some words find."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from attnc.runtime.commands import console
from attnc.runtime.library import ModuleLoader, find, library_files, library_names
from attnc.spec.load import load_program
from attnc.spec.meaning.parameter_values import shown
from attnc.spec.program import Program
from attnc.spec.suggest import did_you_mean

COLUMN = 48
"""Summaries stand in a column at most this far to the right; a longer call moves its own."""

FAMILIES = {
    "masks": "who sees whom on a line of tokens: by position, block, document or head",
    "grids": "pictures and videos: windows, tiles and bands on the axes of a grid",
    "scores": "biases, caps and relative terms of the scores",
    "normalisers": "weights that are more than one softmax over the keys",
    "structures": "several attentions joined, and keys that are no tokens",
    "routing": "chosen by content, or by what was chosen before",
    "recurrences": "a state that tokens change one after another, alone or beside attention",
}
"""The folders of the library in their order, with what their patterns have in common."""


@dataclass(frozen=True, slots=True)
class LibraryEntry:
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
    def source(self) -> str:
        """The text after `Source:` in the docstring, on one line; empty without one."""
        return " ".join(self.program.docstring.partition("Source:")[2].split())

    @property
    def call(self) -> str:
        """Its name with parameters and defaults."""
        parts = [p.name if p.default is None else f"{p.name} = {shown(p.default)}" for p in self.program.parameters]
        return f"{self.program.name}({', '.join(parts)})" if parts else self.program.name

    def holds(self, word: str) -> bool:
        """Whether its name, family or docstring has a word or a part of one, in letters of either case."""
        text = f"{self.program.name} {self.family} {self.program.docstring}"
        return word.lower() in text.lower()


def entries() -> list[LibraryEntry]:
    """All patterns, by family and name."""
    files = library_files()
    order = {family: place for place, family in enumerate(FAMILIES)}
    found = [LibraryEntry(_program(name), files[name]) for name in library_names()]
    return sorted(found, key=lambda entry: (order.get(entry.family, len(order)), entry.family, entry.program.name))


def matching(known: Sequence[LibraryEntry], words: Sequence[str]) -> list[LibraryEntry]:
    """Return the entries of a family, where the only word names one, else the entries that contain every word.

    Raises UsageError where there are none.
    """
    families = {entry.family for entry in known}
    if len(words) == 1 and words[0] in families:
        return [entry for entry in known if entry.family == words[0]]
    result = [entry for entry in known if all(entry.holds(word) for word in words)]
    if not result:
        raise console.UsageError(
            f"no pattern has `{' '.join(words)}` in name, text or source: {_nearest(known, words)}"
        )
    return result


def _nearest(known: Sequence[LibraryEntry], words: Sequence[str]) -> str:
    """Return the names nearest to the first word that no entry contains."""
    unknown = next((word for word in words if not any(entry.holds(word) for entry in known)), None)
    if unknown is None:
        return "fewer words find more"
    listed = f"the families are {', '.join(dict.fromkeys(entry.family for entry in known))}"
    return did_you_mean(unknown, [*FAMILIES, *(entry.program.name for entry in known)], listed)


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `list`."""
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help=f"a family ({', '.join(FAMILIES)}), or words that name, text or source of a pattern hold, as in "
        "`attnc list video`",
    )


def run(args: argparse.Namespace) -> int:
    """Print the patterns by family."""
    found = matching(entries(), args.words)
    if args.json:
        console.print_json({"patterns": [_as_json(entry) for entry in found]})
    else:
        print("\n\n".join(_in_words(found)))
    return console.FINE


def _in_words(found: Iterable[LibraryEntry]) -> list[str]:
    """A block for each family: what it is, then a line for each pattern."""
    found = list(found)
    width = max((len(entry.call) for entry in found if len(entry.call) <= COLUMN), default=0)
    blocks = []
    for family, members in groupby(found, key=lambda entry: entry.family):
        about = FAMILIES.get(family)
        lines = [family if about is None else f"{family}: {about}"]
        lines += [f"  {entry.call.ljust(width)}  {entry.summary}" for entry in members]
        blocks.append("\n".join(lines))
    return blocks


def _program(name: str) -> Program:
    found = find(name)
    return load_program(found.source, ModuleLoader(None), name)


def _as_json(entry: LibraryEntry) -> dict[str, object]:
    program = entry.program
    keys = {"name": program.name, "family": entry.family, "summary": entry.summary, "file": str(entry.file)}
    lists = {"inputs": [i.name for i in program.inputs], "presets": [p.name for p in program.presets]}
    return {**keys, **lists, "source": entry.source}
