"""Lookup of `.attn` texts: library names, files, source text, and the modules that `use` names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from os import PathLike
from pathlib import Path

from attnc.runtime.call.call_errors import ArgumentTypeError, PatternNotFoundError
from attnc.spec.load import load_program
from attnc.spec.program import Program
from attnc.spec.reading.source_text import decode
from attnc.spec.source import SourceFile
from attnc.spec.suggest import did_you_mean

SHOWN = 100
"""Maximum number of characters of an unknown name in a message."""

_MODULE = re.compile(r"[A-Za-z_][A-Za-z_0-9]*\Z")
_IN_FILE = re.compile(r"(?P<file>.+\.attn):(?P<name>[A-Za-z_][A-Za-z_0-9]*)\Z")


@dataclass(frozen=True, slots=True)
class PatternText:
    """A text, the name of its pattern (None: its only one), and the folder whose modules it may use."""

    source: SourceFile
    name: str | None
    folder: Path | None


def find(spec: str | PathLike[str]) -> PatternText:
    """Return the text that a spec names: source with a newline, a path, a name with `.attn`, or a library name.

    Raises PatternNotFoundError, SpecError (a text that cannot be read), ArgumentTypeError.
    """
    if isinstance(spec, PathLike):
        return _file(Path(spec), None)
    if not isinstance(spec, str):
        raise ArgumentTypeError(
            f"spec is {type(spec).__name__}: it must be a library name, a path to an .attn file, or source text"
        )
    if "\n" in spec:
        return PatternText(decode(spec, "<spec>"), None, None)
    in_file = _IN_FILE.match(spec)
    if in_file:
        return _file(Path(in_file["file"]), in_file["name"])
    if spec.endswith(".attn"):
        return _file(Path(spec), None)
    return _library(spec)


def load(spec: str | PathLike[str]) -> tuple[Program, dict[str, SourceFile]]:
    """Return the checked program that a spec names, and the modules that it uses.

    Raises SpecError, and the errors of `find`.
    """
    text = find(spec)
    loader = ModuleLoader(text.folder)
    return load_program(text.source, loader, text.name), loader.given


def _file(path: Path, name: str | None) -> PatternText:
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PatternNotFoundError(f"cannot read {path}: {reason}; give the path of an .attn file") from error
    return PatternText(decode(data, str(path)), name, path.parent)


def _library(name: str) -> PatternText:
    source = library_source(name) if _is_pattern(name) else None
    if source is None:
        hint = did_you_mean(name, library_names(), "`attnc list` shows the library")
        shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
        raise PatternNotFoundError(f"the library has no pattern `{shown}`: {hint} (source text needs a newline)")
    return PatternText(source, name, None)


def _root() -> Path:
    return Path(str(resources.files("attnc.stdlib_patterns")))


@cache
def _texts() -> dict[str, Path]:
    return {file.stem: file for file in sorted(_root().glob("*/*.attn"), key=lambda file: file.stem)}


def library_files() -> dict[str, Path]:
    """Return every file of the standard library by stem: patterns in their families' folders, and modules."""
    return dict(_texts())


@cache
def library_names() -> tuple[str, ...]:
    """Return the patterns of the standard library: the files that define a pattern of their own name."""
    return tuple(stem for stem in _texts() if _is_pattern(stem))


@cache
def pattern_names() -> tuple[str, ...]:
    """Return the patterns of queries and keys without states, whose visible pairs do not depend on content."""
    return tuple(name for name in _that_have("pattern") if name not in {*hybrid_names(), *routing_names()})


@cache
def routing_names() -> tuple[str, ...]:
    """Return the patterns whose visible pairs depend on content: by a `select`, or by the caller's selection."""
    return tuple(stem for stem, file in _texts().items() if file.parent.name == "routing")


@cache
def recurrence_names() -> tuple[str, ...]:
    """Return the recurrences: patterns whose tokens update states one after another."""
    return _that_have("recurrence")


@cache
def hybrid_names() -> tuple[str, ...]:
    """Return the patterns with branches that have a state."""
    return tuple(name for name in _that_have("pattern") if "state" in _kinds(name))


_KIND = re.compile("^(pattern |recurrence | +state )", re.MULTILINE)


def _is_pattern(name: str) -> bool:
    return name in _texts() and not _kinds(name).isdisjoint(("pattern", "recurrence"))


def _that_have(kind: str) -> tuple[str, ...]:
    return tuple(stem for stem in _texts() if kind in _kinds(stem))


@cache
def _kinds(stem: str) -> frozenset[str]:
    """Return the keywords at line starts of a file that show what the file defines."""
    return frozenset(word.strip() for word in _KIND.findall(_texts()[stem].read_text(encoding="utf-8")))


def library_source(module: str) -> SourceFile | None:
    """Return the text of a library file, None if it does not exist."""
    file = _texts().get(module)
    return None if file is None else decode(file.read_bytes(), file.relative_to(_root().parent).as_posix())


@dataclass
class ModuleLoader:
    """The modules that `use` may read: the file's folder, then the library. Keeps what it loaded, for pickling a spec.

    A module is a name, never a path: nothing outside the folder and the library can be read.
    """

    folder: Path | None
    given: dict[str, SourceFile] = field(default_factory=dict)

    def __call__(self, module: str, asking: SourceFile) -> SourceFile | None:
        """Return the source of a module, None if it does not exist."""
        del asking
        if module not in self.given:
            source = self._beside(module) or library_source(module)
            if source is None:
                return None
            self.given[module] = source
        return self.given[module]

    def names(self) -> tuple[str, ...]:
        """Return the names of all modules, for suggestions about a misspelt name."""
        beside = self.folder.glob("*.attn") if self.folder is not None else ()
        return (*(path.stem for path in beside), *_texts())

    def _beside(self, module: str) -> SourceFile | None:
        if self.folder is None or not _MODULE.match(module):
            return None
        path = self.folder / f"{module}.attn"
        if not path.is_file() or path.resolve().parent != self.folder.resolve():
            return None  # a symbolic link must not lead out of the folder
        return decode(path.read_bytes(), str(path))
