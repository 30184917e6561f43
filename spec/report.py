"""Where the stages of `spec` put what they find."""

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
        """Add an error: one phrase, its place and a word at the caret, related places, the remedy."""
        self.diagnostics.append(Diagnostic(code, message, Label(span, label), also, help))

    def warning(self, code: str, message: str, span: Span, label: str = "", *, help: str) -> None:
        """Add a warning: a doubt about what is no error."""
        self.diagnostics.append(Diagnostic(code, message, Label(span, label), (), help, Severity.WARNING))

    def extend(self, diagnostics: tuple[Diagnostic, ...]) -> None:
        """Add what another stage found."""
        self.diagnostics.extend(diagnostics)

    @property
    def failed(self) -> bool:
        """Whether there is an error among them."""
        return any(d.severity is Severity.ERROR for d in self.diagnostics)
