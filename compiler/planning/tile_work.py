"""The live tiles of a relation in one order of tokens, as kernels walk them: strips of full and partial tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Strips:
    """Tile rows or columns: `times[i]` strips have `full[i]` full tiles and `partial[i]` partial tiles each."""

    full: Int64
    partial: Int64
    times: Int64

    @property
    def count(self) -> int:
        """The number of strips."""
        return int(self.times.sum())

    @property
    def full_tiles(self) -> int:
        """The full tiles of all strips."""
        return int((self.full * self.times).sum())

    @property
    def partial_tiles(self) -> int:
        """The partial tiles of all strips."""
        return int((self.partial * self.times).sum())

    @property
    def live(self) -> int:
        """The live tiles of all strips."""
        return self.full_tiles + self.partial_tiles

    def repeated(self, times: int) -> Strips:
        """Return the strips with each repeated `times` times."""
        return Strips(self.full, self.partial, self.times * times)

    def split(self, parts: int) -> Strips:
        """Return the strips with each split into `parts` parts of nearly equal numbers of tiles."""
        if parts == 1:
            return self
        pieces = []
        for i in range(parts):
            full = self.full // parts + (i < self.full % parts)
            partial = self.partial // parts + (i >= parts - self.partial % parts)
            pieces.append(strips(full, partial, self.times))
        return together(pieces)


NO_STRIPS = Strips(*(np.zeros(0, dtype=np.int64) for _ in range(3)))


def strips(full: Int64, partial: Int64, times: Int64 | None = None) -> Strips:
    """Return strips from the tiles of each strip; equal strips are counted together, empty strips left out."""
    times = np.ones(len(full), dtype=np.int64) if times is None else times
    is_live = (full + partial) > 0
    full, partial, times = full[is_live], partial[is_live], times[is_live]
    if not len(full):
        return NO_STRIPS
    step = int(partial.max()) + 1
    code, number = np.unique(full * step + partial, return_inverse=True)
    counted = np.bincount(number.ravel(), weights=times).astype(np.int64)
    return Strips(code // step, code % step, counted)


def together(parts: Iterable[Strips]) -> Strips:
    """Return the strips of all parts together."""
    collected = list(parts)
    if len(collected) == 1:
        return collected[0]
    if not collected:
        return NO_STRIPS
    return strips(*(np.concatenate([getattr(p, name) for p in collected]) for name in ("full", "partial", "times")))


@dataclass(frozen=True, slots=True)
class Order:
    """The order of tokens in tiles; bricks have a side for each axis, residue classes have `divisors`."""

    kind: Literal["natural", "bricks", "residues"]
    q_brick: tuple[int, ...] = ()
    k_brick: tuple[int, ...] = ()
    divisors: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == "bricks":
            q, k = ("×".join(map(str, brick)) for brick in (self.q_brick, self.k_brick))
            return f"bricks of {q} queries and {k} keys"
        if self.kind == "residues":
            return f"residue classes modulo {', '.join(map(str, self.divisors))}"
        return "natural order"


NATURAL = Order("natural")


@dataclass(frozen=True, eq=False)
class TileWork:
    """The live tiles of a relation, by rows for the forward and by columns for the gradient of keys.

    `visible`: visible pairs, None where they were not counted. `merged`: rows of the output that two walks write and a
    merge combines. `sampled`: the number of tile rows from which the counts are extrapolated, 0 if all were counted.
    """

    order: Order
    q_tile: int
    k_tile: int
    rows: Strips
    columns: Strips
    visible: int | None
    merged: int = 0
    sampled: int = 0

    def repeated(self, times: int) -> TileWork:
        """Return the work of `times` equal relations."""
        visible = None if self.visible is None else self.visible * times
        rows, columns = self.rows.repeated(times), self.columns.repeated(times)
        return replace(self, rows=rows, columns=columns, visible=visible, merged=self.merged * times)


def joined(parts: Sequence[TileWork], order: Order, q_tile: int, k_tile: int) -> TileWork:
    """Return the work of several relations that are walked by one kernel."""
    counts = [part.visible for part in parts]
    return TileWork(
        order,
        q_tile,
        k_tile,
        together(part.rows for part in parts),
        together(part.columns for part in parts),
        None if None in counts else sum(n for n in counts if n is not None),
        sum(part.merged for part in parts),
        max((part.sampled for part in parts), default=0),
    )
