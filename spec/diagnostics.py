"""Diagnostics as values: collected by the stages of `spec`, rendered elsewhere (`spec.render`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from attnc.spec.source import Span


class Severity(Enum):
    """How bad it is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Label:
    """A place in the source and a phrase about it."""

    span: Span
    text: str = ""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding: a stable code (see `spec.codes`), one phrase, its place, related places, the remedy."""

    code: str
    message: str
    primary: Label
    secondary: tuple[Label, ...] = ()
    help: str = ""
    severity: Severity = Severity.ERROR

    @property
    def sort_key(self) -> tuple[str, int, str, str]:
        """Order of display: by file, place, code."""
        return (self.primary.span.source.name, self.primary.span.start, self.code, self.message)


def in_order(diagnostics: Iterable[Diagnostic]) -> tuple[Diagnostic, ...]:
    """The distinct diagnostics, sorted by place."""
    return tuple(sorted(dict.fromkeys(diagnostics), key=lambda d: d.sort_key))
