"""Tiles of the attention matrix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TileGrid:
    """n_q rows and n_k keys in tiles. Key tiles start at `k_origin` (≤ 0), so that a diagonal can meet corners."""

    n_q: int
    n_k: int
    q_tile: int
    k_tile: int
    k_origin: int = 0

    @property
    def rows(self) -> int:
        """Tile rows."""
        return -(-self.n_q // self.q_tile)

    @property
    def columns(self) -> int:
        """Tile columns."""
        return -(-(self.n_k - self.k_origin) // self.k_tile)

    def row_range(self, row: int) -> tuple[int, int]:
        """The rows of a tile row, half-open."""
        return row * self.q_tile, min((row + 1) * self.q_tile, self.n_q)

    def key_range(self, column: int) -> tuple[int, int]:
        """The keys of a tile column, half-open."""
        start = self.k_origin + column * self.k_tile
        return max(start, 0), min(start + self.k_tile, self.n_k)
