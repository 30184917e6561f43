"""The exception for syntax errors inside `reading`; `parse` turns it into a `SpecError`."""

from __future__ import annotations

from attnc.spec.diagnostics import Diagnostic, Label
from attnc.spec.source import SourceFile, Span


class Fault(Exception):  # noqa: N818 - internal: never leaves `spec`
    """A diagnostic with character offsets. `also` is a second span (start, end) with its phrase."""

    def __init__(
        self,
        code: str,
        message: str,
        start: int,
        end: int,
        *,
        label: str = "",
        also: tuple[int, int, str] | None = None,
        help: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.start = start
        self.end = end
        self.label = label
        self.also = also
        self.help = help

    def in_source(self, source: SourceFile) -> Diagnostic:
        """Return the fault as a diagnostic in its source file."""
        secondary = (Label(_span(source, *self.also[:2]), self.also[2]),) if self.also else ()
        primary = Label(_span(source, self.start, self.end), self.label)
        return Diagnostic(self.code, self.message, primary, secondary, self.help)


def _span(source: SourceFile, start: int, end: int) -> Span:
    # The parser reads the text with an additional line end.
    size = len(source.text)
    return Span(source, min(start, size), min(end, size))
