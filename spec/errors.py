"""The base of every public error, and the error that carries diagnostics."""

from __future__ import annotations

from attnc.spec.diagnostics import Diagnostic, in_order
from attnc.spec.render import render
from attnc.spec.source import Span


class AttncError(Exception):
    """Base of every error that attnc raises on purpose."""


class SpecError(AttncError, ValueError):
    """A `.attn` text (or its parameters) is wrong. `diagnostics` says where and what to do."""

    def __init__(self, diagnostics: tuple[Diagnostic, ...]) -> None:
        self.diagnostics = in_order(diagnostics)
        super().__init__("\n\n".join(render(d) for d in self.diagnostics))


class EvaluationError(AttncError, ArithmeticError):
    """An exact expression has no value: a number past 64 bits, a division by zero, an index out of range.

    `span` is the place in the source where it arose, if known.
    """

    def __init__(self, message: str, span: Span | None = None) -> None:
        self.span = span
        super().__init__(message if span is None else f"{span}: {message} (in `{span.text}`)")
