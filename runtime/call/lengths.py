"""Lengths that a pattern's own parameters determine."""

from __future__ import annotations

from math import prod

from attnc.spec.meaning.parameter_values import constant_value
from attnc.spec.program import BoundProgram, SegmentAxis, Size

SHORT = 64
"""Default length, for example of a picture."""


def natural_length(bound: BoundProgram, about: int = SHORT) -> int | None:
    """Return the length of the segments: exact where all extents are parameters, else close to `about` tokens."""
    if not bound.program.segments:
        return None
    fixed, row = fixed_and_row(bound)
    return fixed + row * max(1, (about - fixed) // row) if row else fixed


def fixed_and_row(bound: BoundProgram) -> tuple[int, int]:
    """Return the tokens that the segments always have, and the step by which a call may be longer (0: none)."""
    fixed, row = 0, 0
    for segment in bound.program.segments:
        extents = [extent_of(bound, axis) for axis in segment.axes]
        size = prod(e for e in extents if e is not None)
        if None in extents:
            row = size
        else:
            fixed += size
    return fixed, row


def extent_of(bound: BoundProgram, axis: SegmentAxis) -> int | None:
    """Return the extent of an axis, None where the call decides it."""
    value = None if isinstance(axis.extent, Size) else constant_value(bound, axis.extent)
    return value if isinstance(value, int) else None
