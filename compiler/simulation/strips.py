"""The live tiles of a strip of tiles, as the kernel that walks it counts them: so many full, so many partial."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Strips:
    """Tile rows (or columns): `times[i]` of them have `full[i]` full tiles and `partial[i]` partial ones."""

    full: Int64
    partial: Int64
    times: Int64

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.times.sum())

    @property
    def full_tiles(self) -> int:
        """Full tiles of all of them."""
        return int((self.full * self.times).sum())

    @property
    def partial_tiles(self) -> int:
        """Partial tiles of all of them."""
        return int((self.partial * self.times).sum())

    @property
    def live(self) -> int:
        """Live tiles of all of them."""
        return self.full_tiles + self.partial_tiles

    def repeated(self, times: int) -> Strips:
        """So many of each."""
        return Strips(self.full, self.partial, self.times * times)

    def split(self, parts: int) -> Strips:
        """Each in so many parts of nearly as many tiles."""
        if parts == 1:
            return self
        pieces = []
        for i in range(parts):
            full = self.full // parts + (i < self.full % parts)
            partial = self.partial // parts + (i >= parts - self.partial % parts)
            pieces.append(strips(full, partial, self.times))
        return together(pieces)


NOTHING = Strips(*(np.zeros(0, dtype=np.int64) for _ in range(3)))


def strips(full: Int64, partial: Int64, times: Int64 | None = None) -> Strips:
    """Return strips from the tiles of each; equal strips are counted, empty ones left out."""
    times = np.ones(len(full), dtype=np.int64) if times is None else times
    some = (full + partial) > 0
    full, partial, times = full[some], partial[some], times[some]
    if not len(full):
        return NOTHING
    step = int(partial.max()) + 1
    code, number = np.unique(full * step + partial, return_inverse=True)
    counted = np.bincount(number.ravel(), weights=times).astype(np.int64)
    return Strips(code // step, code % step, counted)


def together(parts: Iterable[Strips]) -> Strips:
    """The strips of all parts."""
    found = list(parts)
    if len(found) == 1:
        return found[0]
    if not found:
        return NOTHING
    return strips(*(np.concatenate([getattr(p, name) for p in found]) for name in ("full", "partial", "times")))
