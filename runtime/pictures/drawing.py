"""A picture of a pattern as data: both views, the counts and the words under them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
T = TypeVar("T", np.int64, np.float64)
EMPTY, PARTIAL, FULL = 0, 1, 2
"""States of a tile."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """A head of a pattern at a length.

    `pairs` counts the visible pairs in each square of `cell` queries by `cell` keys; `tiles` holds the state of each
    tile of `q_tile` queries by `k_tile` keys; `row_counts` holds the number of visible keys of each query. Squares and
    tiles at the lower and right edges may be smaller.
    """

    title: str
    subtitle: str
    relation: str
    n_q: int
    n_k: int
    cell: int
    pairs: Counts
    q_tile: int
    k_tile: int
    tiles: NDArray[np.int8]
    row_counts: Counts
    align: Literal["start", "end"] | None = None
    notes: tuple[str, ...] = ()

    @property
    def visible(self) -> int:
        """The number of visible pairs."""
        return int(self.row_counts.sum())

    @property
    def total(self) -> int:
        """The number of all pairs."""
        return self.n_q * self.n_k

    @property
    def density(self) -> float:
        """The visible share of all pairs; 0 without pairs."""
        return self.visible / self.total if self.total else 0.0

    @property
    def fewest(self) -> int:
        """The smallest number of keys that a query sees."""
        return int(self.row_counts.min(initial=self.n_k))

    @property
    def most(self) -> int:
        """The largest number of keys that a query sees."""
        return int(self.row_counts.max(initial=0))

    def count_tiles(self, state: int) -> int:
        """Return the number of tiles in a state."""
        return int((self.tiles == state).sum())

    @property
    def live(self) -> int:
        """The number of tiles that are not empty."""
        return int((self.tiles != EMPTY).sum())

    @property
    def areas(self) -> Counts:
        """The number of pairs in each square of `pairs`."""
        return np.outer(extents(self.n_q, self.cell), extents(self.n_k, self.cell))

    @property
    def share(self) -> NDArray[np.float64]:
        """The visible share of each square."""
        return self.pairs / self.areas

    def coarser(self, factor: int) -> NDArray[np.float64]:
        """Return the visible share of squares that are `factor` times as large."""
        return summed(self.pairs, factor) / summed(self.areas, factor)

    # --- words ---

    @property
    def pairs_text(self) -> str:
        """The numbers of visible pairs and of all pairs as text."""
        return f"{self.visible:,} of {self.total:,} pairs"

    @property
    def rows_text(self) -> str:
        """The range of keys per row as text."""
        return f"{self.fewest:,}" if self.fewest == self.most else f"{self.fewest:,} – {self.most:,}"

    @property
    def square_text(self) -> str:
        """The caption for a square of the element view."""
        if self.cell == 1:
            return "each square: one query–key pair"
        return f"each square: {self.cell:,} × {self.cell:,} pairs"

    @property
    def align_text(self) -> str:
        """The alignment of queries and keys, if the pattern states one."""
        match self.align:
            case "end":
                return "align end: the last query stands at the last key"
            case "start":
                return "align start: the first query stands at the first key"
        return ""

    @property
    def size_text(self) -> str:
        """The numbers of queries and keys as text."""
        return f"{self.n_q:,} queries × {self.n_k:,} keys"


def extents(n: int, step: int) -> Counts:
    """Return the lengths of the stretches of `step` that cover `n`; the last may be shorter."""
    return np.minimum(np.arange(0, n, step) + step, n) - np.arange(0, n, step)


def percent(share: float) -> str:
    """Return a share as a percentage with four digits; 0 % and 100 % only for exactly 0 and 1."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    digits = next((d for d in range(2, 12) if 0 < round(share, d + 2) < 1 and share * 10 ** (d + 2) >= 100), 12)
    return f"{100 * share:.{digits}f} %"


def merge_tiles(tiles: NDArray[np.int8], factor: int) -> NDArray[np.int8]:
    """Return the states of groups of tiles: full or empty if all tiles are, else partial."""
    if factor == 1:
        return tiles
    live = summed((tiles != EMPTY).astype(np.int64), factor)
    full = summed((tiles == FULL).astype(np.int64), factor)
    area = summed(np.ones(tiles.shape, dtype=np.int64), factor)
    return np.where(full == area, FULL, np.where(live == 0, EMPTY, PARTIAL)).astype(np.int8)


def coarsening(size: int, most: int) -> int:
    """Return the smallest power of two such that stretches of so many cover `size` cells `most` times at most."""
    return 1 << (-(-size // max(most, 1)) - 1).bit_length() if size else 1


def summed(numbers: NDArray[T], factor: int) -> NDArray[T]:
    """Return the sums of squares of `factor` by `factor` numbers; squares at the edges may be smaller."""
    rows = np.add.reduceat(numbers, np.arange(0, numbers.shape[0], factor), axis=0)
    return np.asarray(np.add.reduceat(rows, np.arange(0, numbers.shape[1], factor), axis=1))


def means(numbers: NDArray[Any], factor: int) -> NDArray[np.float64]:
    """Return the means of squares of `factor` by `factor` numbers."""
    return summed(numbers, factor) / np.outer(*(extents(side, factor) for side in numbers.shape))


def runs(line: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the runs of true in a line, as (start, length)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]])))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
