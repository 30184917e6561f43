"""The goals for a CPU."""

from __future__ import annotations

from goals import Goal

GOALS: tuple[Goal, ...] = ()
