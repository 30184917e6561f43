"""A syntax fault on its way up: raised where no source is at hand, turned into a `SpecError` by `parse`."""

from __future__ import annotations

from attnc.spec.diagnostics import Diagnostic, Label
from attnc.spec.source import SourceFile, Span


class Fault(Exception):  # noqa: N818 - a message under way, never seen outside `spec`
    """A diagnostic in offsets. `also` is a second place with its phrase."""

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
        """Return the diagnostic of the fault in its source."""
        secondary = (Label(_span(source, *self.also[:2]), self.also[2]),) if self.also else ()
        primary = Label(_span(source, self.start, self.end), self.label)
        return Diagnostic(self.code, self.message, primary, secondary, self.help)


def _span(source: SourceFile, start: int, end: int) -> Span:
    # The parser reads one final line end more than the text has.
    size = len(source.text)
    return Span(source, min(start, size), min(end, size))
