"""The grid of tiles of the attention matrix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TileGrid:
    """A grid of tiles over n_q rows and n_k keys. Key tiles start at `k_origin` ≤ 0, so diagonals can meet corners."""

    n_q: int
    n_k: int
    q_tile: int
    k_tile: int
    k_origin: int = 0

    @property
    def rows(self) -> int:
        """The number of tile rows."""
        return -(-self.n_q // self.q_tile)

    @property
    def columns(self) -> int:
        """The number of tile columns."""
        return -(-(self.n_k - self.k_origin) // self.k_tile)

    def row_range(self, row: int) -> tuple[int, int]:
        """Return the range of rows of a tile row, half-open."""
        return row * self.q_tile, min((row + 1) * self.q_tile, self.n_q)

    def key_range(self, column: int) -> tuple[int, int]:
        """Return the range of keys of a tile column, half-open."""
        start = self.k_origin + column * self.k_tile
        return max(start, 0), min(start + self.k_tile, self.n_k)
