"""Python warnings about patterns that compile and calls that run, each attributed to the line of the user."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from attnc.spec.diagnostics import Diagnostic

_INSIDE = ("attnc", "torch")


class PatternWarning(UserWarning):
    """A compiled pattern does something that is rarely intended. `attnc check` prints the same, with the place."""


class NoGradientWarning(UserWarning):
    """An input requires a gradient and gets none: the pattern only ranks a selection by it."""


class LayoutWarning(UserWarning):
    """Tensors look like (batch, tokens, heads, head dimension), but are read as (batch, heads, tokens, …)."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the nearest frame outside attnc and torch."""
    depth = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame = frame.f_back
        depth += 1
    warnings.warn(message, category, stacklevel=depth + 1)


def warn_of_pattern(name: str, diagnostics: Iterable[Diagnostic]) -> None:
    """Warn with PatternWarning about each diagnostic of a pattern."""
    for diagnostic in diagnostics:
        place = diagnostic.primary.span
        help_ = f"; {diagnostic.help}" if diagnostic.help else ""
        warn(
            f"`{name}`, {place.source.name}:{place.line}: {diagnostic.message}{help_} ({diagnostic.code})",
            PatternWarning,
        )


def warn_of_gradient(pattern: str, name: str) -> None:
    """Warn with NoGradientWarning about an input that requires a gradient."""
    warn(
        f"`{pattern}` only ranks a selection by `{name}`, which requires a gradient and gets none, because a choice "
        f"has no gradient: read `{name}` in the output too, as in `value sigmoid({name}[…]) * v`, or call with "
        f"`{name}.detach()`",
        NoGradientWarning,
    )
