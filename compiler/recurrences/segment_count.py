"""The number of segments into which a sequence is split if heads are too few for the device."""

from __future__ import annotations

SHORTEST = 8
"""Minimum number of chunks of a segment."""

SEGMENTS = (4, 8, 16, 32, 64, 128)
"""Allowed numbers of segments. Two segments gain nothing: a split walk runs twice (`kernels.segment_kernels`)."""


def fitting_segments(programs: int, chunks: int, multiprocessors: int) -> int:
    """Return the number of segments for a walk over `chunks` chunks with `programs` programs; 1: do not split.

    The result is the largest of `SEGMENTS` for which every program has its own multiprocessor and every segment has at
    least `SHORTEST` chunks.
    """
    counts = [count for count in SEGMENTS if count * SHORTEST <= chunks and count * programs <= multiprocessors]
    return max(counts, default=1)


def even_segments(segments: int, chunks: int) -> int:
    """Return at most `segments` segments, so that all but the last have equally many chunks and none is empty."""
    span = -(-chunks // segments)
    return -(-chunks // span)
