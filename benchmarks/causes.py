"""Why rows are behind, where it is known."""

from __future__ import annotations

from collections.abc import Callable

from goals import Found, Goal

UNKNOWN = "cause not known yet"

Test = Callable[[Goal, Found], bool]

CAUSES: tuple[tuple[Test, str], ...] = ()
"""Tests in order, the first that fits tells the cause."""


def why(goal: Goal, found: Found) -> str:
    """The cause of a value that is behind."""
    return next((text for test, text in CAUSES if test(goal, found)), UNKNOWN)
