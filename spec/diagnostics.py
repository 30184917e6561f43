"""Errors and warnings as values; the stages of `spec` collect them, and `spec.render` renders them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from attnc.spec.source import Span


class Severity(Enum):
    """The severity of a diagnostic."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Label:
    """A span of the source with a phrase about it."""

    span: Span
    text: str = ""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """An error or a warning: a stable code (see `spec.codes`), its message, its span, related spans, the remedy."""

    code: str
    message: str
    primary: Label
    secondary: tuple[Label, ...] = ()
    help: str = ""
    severity: Severity = Severity.ERROR


def in_order(diagnostics: Iterable[Diagnostic]) -> tuple[Diagnostic, ...]:
    """Return the distinct diagnostics, sorted by file, position and code."""

    def key(d: Diagnostic) -> tuple[str, int, str, str]:
        return d.primary.span.source.name, d.primary.span.start, d.code, d.message

    return tuple(sorted(dict.fromkeys(diagnostics), key=key))


class DiagnosticList:
    """A growing list of diagnostics."""

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostic] = []

    def error(
        self,
        code: str,
        message: str,
        span: Span,
        label: str = "",
        *,
        also: tuple[Label, ...] = (),
        help: str = "",
    ) -> None:
        """Add an error: its message, its span with a label at the caret, related spans, and the remedy."""
        self.diagnostics.append(Diagnostic(code, message, Label(span, label), also, help))

    def warning(self, code: str, message: str, span: Span, label: str = "", *, help: str) -> None:
        """Add a warning: its message, its span with a label at the caret, and the remedy."""
        self.diagnostics.append(Diagnostic(code, message, Label(span, label), (), help, Severity.WARNING))

    def extend(self, diagnostics: tuple[Diagnostic, ...]) -> None:
        """Add the diagnostics of another stage."""
        self.diagnostics.extend(diagnostics)

    @property
    def failed(self) -> bool:
        """Whether at least one diagnostic is an error."""
        return any(d.severity is Severity.ERROR for d in self.diagnostics)
