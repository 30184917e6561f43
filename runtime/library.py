"""Finding `.attn` texts: library names, files, source given directly, and the modules that `use` asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from os import PathLike
from pathlib import Path

from attnc.runtime.call_errors import ArgumentTypeError, PatternNotFoundError
from attnc.spec.reading.source_text import decode
from attnc.spec.source import SourceFile
from attnc.spec.suggest import did_you_mean

SHOWN = 100
"""Characters of an unknown name that a message shows at most."""

_MODULE = re.compile(r"[A-Za-z_][A-Za-z_0-9]*\Z")
_IN_FILE = re.compile(r"(?P<file>.+\.attn):(?P<name>[A-Za-z_][A-Za-z_0-9]*)\Z")


@dataclass(frozen=True, slots=True)
class PatternText:
    """A text, the pattern asked for (None: its only one), and the folder whose modules it may use."""

    source: SourceFile
    name: str | None
    folder: Path | None


def find(spec: str | PathLike[str]) -> PatternText:
    """The text that a spec names: source with a newline, a file (a path, or a name with `.attn`), else the library's.

    Raises PatternNotFoundError, SpecError (a text that cannot be read), ArgumentTypeError.
    """
    if isinstance(spec, PathLike):
        return _file(Path(spec), None)
    if not isinstance(spec, str):
        raise ArgumentTypeError(
            f"spec is {type(spec).__name__}: give a library name, a path to an .attn file, or source text"
        )
    if "\n" in spec:
        return PatternText(decode(spec, "<spec>"), None, None)
    in_file = _IN_FILE.match(spec)
    if in_file:
        return _file(Path(in_file["file"]), in_file["name"])
    if spec.endswith(".attn"):
        return _file(Path(spec), None)
    return _library(spec)


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
    """Every file of the standard library by stem: patterns in the folders of their families, modules of definitions."""
    return dict(_texts())


@cache
def library_names() -> tuple[str, ...]:
    """The patterns of the standard library: files that define a pattern of their own name."""
    return tuple(stem for stem in _texts() if _is_pattern(stem))


@cache
def pattern_names() -> tuple[str, ...]:
    """Those of queries and keys alone, whose content does not decide who sees whom."""
    return tuple(name for name in _that_have("pattern") if name not in {*hybrid_names(), *routing_names()})


@cache
def routing_names() -> tuple[str, ...]:
    """Those in which content decides who sees whom: by a `select`, or by what the caller chose before."""
    return tuple(stem for stem, file in _texts().items() if file.parent.name == "routing")


@cache
def recurrence_names() -> tuple[str, ...]:
    """Those of states that tokens update one after another."""
    return _that_have("recurrence")


@cache
def hybrid_names() -> tuple[str, ...]:
    """Those with branches that have a state."""
    return tuple(name for name in _that_have("pattern") if "state" in _kinds(name))


_KIND = re.compile("^(pattern |recurrence | +state )", re.MULTILINE)


def _is_pattern(name: str) -> bool:
    return name in _texts() and not _kinds(name).isdisjoint(("pattern", "recurrence"))


def _that_have(kind: str) -> tuple[str, ...]:
    return tuple(stem for stem in _texts() if kind in _kinds(stem))


@cache
def _kinds(stem: str) -> frozenset[str]:
    """The words that open a line of a file, of those that tell what the file is."""
    return frozenset(word.strip() for word in _KIND.findall(_texts()[stem].read_text(encoding="utf-8")))


def library_source(module: str) -> SourceFile | None:
    """The text of a library file, None where there is none."""
    file = _texts().get(module)
    return None if file is None else decode(file.read_bytes(), file.relative_to(_root().parent).as_posix())


@dataclass
class ModuleLoader:
    """What `use` may see: the folder of the file, then the library. Remembers what it gave, so that a spec is whole.

    A module is named, never a path: nothing outside the folder and the library can be read.
    """

    folder: Path | None
    given: dict[str, SourceFile] = field(default_factory=dict)

    def __call__(self, module: str, asking: SourceFile) -> SourceFile | None:
        """The source of a module, None where there is none."""
        del asking
        if module not in self.given:
            source = self._beside(module) or library_source(module)
            if source is None:
                return None
            self.given[module] = source
        return self.given[module]

    def names(self) -> tuple[str, ...]:
        """The modules that there are, for a name that is misspelt."""
        beside = self.folder.glob("*.attn") if self.folder is not None else ()
        return (*(path.stem for path in beside), *_texts())

    def _beside(self, module: str) -> SourceFile | None:
        if self.folder is None or not _MODULE.match(module):
            return None
        path = self.folder / f"{module}.attn"
        if not path.is_file() or path.resolve().parent != self.folder.resolve():
            return None  # a link may not lead out of the folder
        return decode(path.read_bytes(), str(path))
