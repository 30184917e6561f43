"""The goals for a GPU."""

from __future__ import annotations

from goals import Goal

GOALS: tuple[Goal, ...] = ()
