"""The width of a head as slices that Triton can multiply: powers of two, at least 16."""

from __future__ import annotations

from dataclasses import dataclass

LEAST, MOST = 16, 256
"""Minimum and maximum number of entries of a slice."""

WASTE = 1.15
"""Maximum factor by which a head may be padded to make it a single slice."""


@dataclass(frozen=True, slots=True)
class DepthSlice:
    """Entries `start .. start + width` of a head, of which the first `valid` exist."""

    start: int
    width: int
    valid: int

    @property
    def is_padded(self) -> bool:
        """Whether the slice has entries past the end of the head."""
        return self.valid < self.width


def pieces(size: int) -> tuple[DepthSlice, ...]:
    """Return the slices of a head of this width."""
    padded = max(1 << (size - 1).bit_length(), LEAST)
    if padded <= MOST and (padded <= WASTE * size or size <= LEAST):
        return (DepthSlice(0, padded, size),)
    depth_slices: list[DepthSlice] = []
    start = 0
    while start < size:
        left = size - start
        width = max(min(1 << (left.bit_length() - 1), MOST), LEAST)
        if left < LEAST * 2 and left > width:  # one padded slice for the rest
            width = LEAST * 2
        depth_slices.append(DepthSlice(start, width, min(width, left)))
        start += width
    return tuple(depth_slices)


@dataclass(frozen=True, slots=True)
class Accumulated:
    """The entries that a program accumulates: all slices, or only one of `parts` parts, by the program's number."""

    pieces: tuple[DepthSlice, ...]
    parts: int

    @property
    def step(self) -> int:
        """The number of entries of a part; 0 if a program accumulates all slices."""
        return sum(piece.width for piece in self.pieces) if self.parts > 1 else 0


def accumulated(size: int) -> Accumulated:
    """Return what a program accumulates of a head of this width: wide heads are split into parts."""
    if size <= MOST:
        return Accumulated(pieces(size), 1)
    return Accumulated((DepthSlice(0, MOST, MOST),), -(-size // MOST))
