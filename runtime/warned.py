"""Python warnings about patterns that compile and calls that run, each attributed to the line of the user."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from attnc.spec.diagnostics import Diagnostic

_INSIDE = ("attnc", "torch")


class PatternWarning(UserWarning):
    """A compiled pattern does something that is rarely meant. `attnc check` says the same, and shows where."""


class NoGradientWarning(UserWarning):
    """An input requires a gradient and gets none: the pattern only ranks a selection by it."""


class LayoutWarning(UserWarning):
    """Tensors look like (batch, tokens, heads, head dimension), and are taken as (batch, heads, tokens, …)."""


def warn(message: str, category: type[Warning]) -> None:
    """Give a warning at the nearest frame outside attnc and torch."""
    depth = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame = frame.f_back
        depth += 1
    warnings.warn(message, category, stacklevel=depth + 1)


def warn_of_pattern(name: str, found: Iterable[Diagnostic]) -> None:
    """Give a PatternWarning for each diagnostic of a pattern."""
    for diagnostic in found:
        place = diagnostic.primary.span
        help_ = f"; {diagnostic.help}" if diagnostic.help else ""
        warn(
            f"`{name}`, {place.source.name}:{place.line}: {diagnostic.message}{help_} ({diagnostic.code})",
            PatternWarning,
        )


def warn_of_gradient(pattern: str, name: str) -> None:
    """Give a NoGradientWarning for an input that requires a gradient."""
    warn(
        f"`{pattern}` only ranks a selection by `{name}`, which requires a gradient and gets none, as a choice has no "
        f"gradient: read `{name}` in the output too, as in `value sigmoid({name}[…]) * v`, or call with "
        f"`{name}.detach()`",
        NoGradientWarning,
    )
