"""Limits on the scores that a selection computes together."""

from __future__ import annotations

AT_ONCE = 1 << 21
ON_DEVICE = 1 << 27
"""Scores of one block of rows, over all heads, on a CPU and on another device."""
