"""Limits on the number of scores that a selection computes at once."""

from __future__ import annotations

AT_ONCE = 1 << 21
ON_DEVICE = 1 << 27
"""Maximum number of scores in one block of rows, over all heads, on a CPU and on other devices."""
