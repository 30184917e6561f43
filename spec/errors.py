"""The base class of every public error, and the errors that carry diagnostics."""

from __future__ import annotations

from attnc.spec.diagnostics import Diagnostic, Label, in_order
from attnc.spec.render import render
from attnc.spec.source import Span


class AttncError(Exception):
    """Base class of every error that attnc raises on purpose."""


class SpecError(AttncError, ValueError):
    """A `.attn` text or the values of its parameters are invalid. `diagnostics` says where and what to do."""

    def __init__(self, diagnostics: tuple[Diagnostic, ...]) -> None:
        self.diagnostics = in_order(diagnostics)
        super().__init__("\n\n".join(render(d) for d in self.diagnostics))


class EvaluationError(AttncError, ArithmeticError):
    """An exact expression is undefined: a number beyond 64 bits, a division by zero, an index out of range.

    `span` is the position in the source, if it is known; `diagnostics` then holds a diagnostic for it.
    """

    def __init__(self, code: str, message: str, span: Span | None, help: str = "") -> None:
        self.span = span
        self.diagnostics = () if span is None else (Diagnostic(code, message, Label(span), help=help),)
        unplaced = f"{message} [{code}]" + (f"\nhelp: {help}" if help else "")
        super().__init__("\n\n".join(map(render, self.diagnostics)) or unplaced)
