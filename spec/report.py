"""Collect the diagnostics of the stages of `spec`."""

from __future__ import annotations

from attnc.spec.diagnostics import Diagnostic, Label, Severity
from attnc.spec.source import Span


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
