"""In how many segments a lane of a recurrence is split, where there are too few lanes for the machine."""

from __future__ import annotations

SHORTEST = 8
"""Chunks of a segment at least."""

SEGMENTS = (4, 8, 16, 32, 64, 128)
"""Never 2: a split walk is walked twice (`compiler.recurrences.kernels.segments`), and twice a half is the whole."""


def fitting_segments(programs: int, chunks: int, multiprocessors: int) -> int:
    """Return the segments of a walk over `chunks` chunks with `programs` programs if unsplit; 1: it stays whole.

    The most of `SEGMENTS` that leave every program a multiprocessor of its own, and a segment `SHORTEST` chunks.
    """
    counts = [count for count in SEGMENTS if count * SHORTEST <= chunks and count * programs <= multiprocessors]
    return max(counts, default=1)


def even_segments(segments: int, chunks: int) -> int:
    """As many as asked for or fewer: all but the last have equally many chunks, and none has no chunk."""
    span = -(-chunks // segments)
    return -(-chunks // span)


__all__ = ["SEGMENTS", "SHORTEST", "even_segments", "fitting_segments"]
