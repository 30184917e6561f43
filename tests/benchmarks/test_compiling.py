"""The suite of first calls compiles every file of the library, with all parameters that the file needs."""

from __future__ import annotations

import compiling
import pytest

from attnc.runtime.texts.library import (
    ModuleLoader,
    find,
    library_files,
    library_names,
)
from attnc.spec.load import load_program


def test_parameters_are_of_the_library() -> None:
    assert set(compiling.NEEDED) <= set(library_names())


@pytest.mark.parametrize("name", library_names())
def test_parameters_without_a_default_are_given(name: str) -> None:
    own = find(name)
    program = load_program(own.source, ModuleLoader(own.folder), name)
    missing = {one.name for one in program.parameters if one.default is None}
    assert missing <= compiling.NEEDED.get(name, {}).keys()


@pytest.mark.parametrize("name", sorted(library_files()))
def test_every_file_has_a_row(name: str) -> None:
    times = compiling._file(name, 1)["ms"]
    assert times.keys() == ({"attnc", "attnc, compiled"} if name in library_names() else {"attnc"})


def test_processes_that_are_timed_keep_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    compiling._process("import sys; assert not sys.dont_write_bytecode")
