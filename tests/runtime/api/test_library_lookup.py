"""Lookup of the library's patterns."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnc.runtime.call.call_errors import PatternNotFoundError
from attnc.runtime.texts import library


def test_each_pattern_has_one_kind() -> None:
    kinds = (library.pattern_names, library.routing_names, library.recurrence_names, library.hybrid_names)
    assert sorted(name for names in kinds for name in names()) == list(library.library_names())


def test_modules_of_definitions_are_no_patterns() -> None:
    modules = library.library_files().keys() - set(library.library_names())
    assert "windows" in modules
    for name in modules:
        with pytest.raises(PatternNotFoundError, match=f"no pattern `{name}`"):
            library.find(name)


def test_finding_a_pattern_reads_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    library._kinds.cache_clear()
    read, read_text = [], Path.read_text

    def counted(self: Path, *arguments: str, **options: str) -> str:
        read.append(self.stem)
        return read_text(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", counted)
    assert library.find("sliding_window").source.name.endswith("sliding_window.attn")
    assert read == ["sliding_window"]
