"""The order of the library: short files, each in the folder of a known family, with valid presets."""

from __future__ import annotations

import pytest

from attnc import compile_attention
from attnc.runtime.commands.list_patterns import FAMILIES, LibraryEntry, entries
from attnc.runtime.texts.library import library_files, library_names

ENTRIES = entries()
LINES, COLUMNS = 30, 120
"""Maximum size of a pattern's text without its docstring."""


def name_of(entry: LibraryEntry) -> str:
    return entry.program.name


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_a_file_is_short(entry: LibraryEntry) -> None:
    text = entry.file.read_text(encoding="utf-8")
    before, _, after = text.split('"""')
    assert sum(bool(line.strip()) for line in (before + after).splitlines()) <= LINES
    assert max(map(len, text.splitlines())) <= COLUMNS


def test_every_file_is_in_the_folder_of_a_family() -> None:
    assert {entry.family for entry in ENTRIES} == set(FAMILIES)
    modules = {name for name in library_files() if name not in library_names()}
    assert {library_files()[name].parent.name for name in modules} == {"modules"}


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.program.parameters], ids=name_of)
def test_patterns_with_parameters_have_valid_presets(entry: LibraryEntry) -> None:
    presets = [preset.name for preset in entry.program.presets]
    assert presets
    for preset in presets:
        assert compile_attention(entry.program.name, preset=preset).name == entry.program.name
