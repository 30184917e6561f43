"""`attnc list`: list the library's patterns by family, or those that contain given words."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from attnc.runtime.commands import console
from attnc.runtime.texts.library import library_files, library_names, load
from attnc.spec.meaning.parameter_values import shown
from attnc.spec.program import Program
from attnc.spec.suggest import did_you_mean

COLUMN = 48
"""Summaries start at this column at the latest; after a longer call, the summary starts further right."""

FAMILIES = {
    "masks": "visibility in a sequence of tokens: by position, block, document or head",
    "grids": "images and videos: windows, tiles and bands on the axes of a grid",
    "scores": "biases, caps and relative terms of the scores",
    "normalisers": "weights other than one softmax over the keys",
    "structures": "several attentions combined, and keys that are not tokens",
    "routing": "keys selected by content, or by an earlier selection",
    "recurrences": "a state that tokens update one after another, alone or combined with attention",
}
"""The folders of the library in their order, each with a description of its patterns."""


@dataclass(frozen=True, slots=True)
class LibraryEntry:
    """A pattern of the library."""

    program: Program
    file: Path

    @property
    def family(self) -> str:
        """The name of the folder that holds the pattern."""
        return self.file.parent.name

    @property
    def summary(self) -> str:
        """The first sentence of the pattern's docstring."""
        text = " ".join(self.program.docstring.split("\n\n")[0].split())
        end = text.find(". ")
        return text if end < 0 else text[: end + 1]

    @property
    def source(self) -> str:
        """The text after `Source:` in the docstring, on one line; empty without one."""
        return " ".join(self.program.docstring.partition("Source:")[2].split())

    @property
    def call(self) -> str:
        """The pattern's name with its parameters and defaults."""
        parts = [p.name if p.default is None else f"{p.name} = {shown(p.default)}" for p in self.program.parameters]
        return f"{self.program.name}({', '.join(parts)})" if parts else self.program.name

    def holds(self, word: str) -> bool:
        """Whether the pattern's name, family or docstring contains a word, in upper or lower case."""
        text = f"{self.program.name} {self.family} {self.program.docstring}"
        return word.lower() in text.lower()


def entries() -> list[LibraryEntry]:
    """Return all patterns of the library, sorted by family and name."""
    files = library_files()
    order = {family: index for index, family in enumerate(FAMILIES)}
    patterns = [LibraryEntry(load(name)[0], files[name]) for name in library_names()]
    return sorted(patterns, key=lambda entry: (order.get(entry.family, len(order)), entry.family, entry.program.name))


def matching(patterns: Sequence[LibraryEntry], words: Sequence[str]) -> list[LibraryEntry]:
    """Return the entries of a family if the only word names one, else the entries that contain every word.

    Raises UsageError where no entry matches.
    """
    families = {entry.family for entry in patterns}
    if len(words) == 1 and words[0] in families:
        return [entry for entry in patterns if entry.family == words[0]]
    result = [entry for entry in patterns if all(entry.holds(word) for word in words)]
    if not result:
        raise console.UsageError(
            f"no pattern contains `{' '.join(words)}` in its name, family or docstring: {_nearest(patterns, words)}"
        )
    return result


def _nearest(patterns: Sequence[LibraryEntry], words: Sequence[str]) -> str:
    """Return a hint about the first word that no entry contains: the nearest name, or the families."""
    unknown = next((word for word in words if not any(entry.holds(word) for entry in patterns)), None)
    if unknown is None:
        return "use fewer words"
    listed = f"the families are {', '.join(dict.fromkeys(entry.family for entry in patterns))}"
    return did_you_mean(unknown, [*FAMILIES, *(entry.program.name for entry in patterns)], listed)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `list`."""
    parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help=f"a family ({', '.join(FAMILIES)}), or words to search for in names, families and docstrings, as "
        "in `attnc list video`",
    )


def run(args: argparse.Namespace) -> int:
    """Print the patterns by family."""
    matches = matching(entries(), args.words)
    console.print_answer(args, {"patterns": list(map(_as_json, matches))}, "\n\n".join(_in_words(matches)))
    return console.FINE


def _in_words(matches: Iterable[LibraryEntry]) -> list[str]:
    """Return a block of text for each family: its description, then a line for each pattern."""
    patterns = list(matches)
    width = max((len(entry.call) for entry in patterns if len(entry.call) <= COLUMN), default=0)
    blocks = []
    for family, members in groupby(patterns, key=lambda entry: entry.family):
        description = FAMILIES.get(family)
        lines = [family if description is None else f"{family}: {description}"]
        lines += [f"  {entry.call.ljust(width)}  {entry.summary}" for entry in members]
        blocks.append("\n".join(lines))
    return blocks


def _as_json(entry: LibraryEntry) -> dict[str, object]:
    program = entry.program
    keys = {"name": program.name, "family": entry.family, "summary": entry.summary, "file": str(entry.file)}
    lists = {"inputs": [i.name for i in program.inputs], "presets": [p.name for p in program.presets]}
    return {**keys, **lists, "source": entry.source}
