"""The width of a head in pieces that Triton can multiply: powers of two of at least 16."""

from __future__ import annotations

from dataclasses import dataclass

LEAST, MOST = 16, 256
"""Entries of a piece."""

WASTE = 1.15
"""A head that is padded to one piece may be so much wider."""


@dataclass(frozen=True, slots=True)
class DepthSlice:
    """Entries `start .. start + width` of a head, of which the first `valid` exist."""

    start: int
    width: int
    valid: int

    @property
    def is_padded(self) -> bool:
        """Whether entries are missing."""
        return self.valid < self.width


def pieces(size: int) -> tuple[DepthSlice, ...]:
    """The pieces of a head of this size."""
    padded = max(1 << (size - 1).bit_length(), LEAST)
    if padded <= MOST and (padded <= WASTE * size or size <= LEAST):
        return (DepthSlice(0, padded, size),)
    depth_slices: list[DepthSlice] = []
    start = 0
    while start < size:
        left = size - start
        width = max(min(1 << (left.bit_length() - 1), MOST), LEAST)
        if left < LEAST * 2 and left > width:  # one padded piece for the rest
            width = LEAST * 2
        depth_slices.append(DepthSlice(start, width, min(width, left)))
        start += width
    return tuple(depth_slices)


@dataclass(frozen=True, slots=True)
class Accumulated:
    """The entries that a program adds up: all pieces, or the part with the program's number, of so many."""

    pieces: tuple[DepthSlice, ...]
    parts: int

    @property
    def step(self) -> int:
        """Entries of a part."""
        return sum(piece.width for piece in self.pieces) if self.parts > 1 else 0


def accumulated(size: int) -> Accumulated:
    """How a head of this size is added up: wide ones in parts."""
    if size <= MOST:
        return Accumulated(pieces(size), 1)
    return Accumulated((DepthSlice(0, MOST, MOST),), -(-size // MOST))
