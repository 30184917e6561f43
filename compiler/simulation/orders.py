"""Count the live tiles of a relation in every order of tokens: natural, in bricks of a grid, in residue classes."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.ir import Index
from attnc.compiler.planning.brick_work import BrickFinder, find_bricks
from attnc.compiler.planning.residues import residues, split
from attnc.compiler.planning.tile_work import Order, TileWork, joined
from attnc.compiler.simulation.natural_tiles import Origins, count_natural


class TileFinder:
    """Counts the tiles of a specialised relation over n_q rows and n_k keys in every order that applies."""

    def __init__(self, relation: Index, n_q: int, n_k: int, origins: Origins) -> None:
        self._relation, self._n_q, self._n_k, self._origins = relation, n_q, n_k, origins
        self._natural: dict[tuple[int, int], TileWork] = {}
        self._classes: dict[object, TileFinder] = {}

    # --- in natural order

    def natural(self, q_tile: int, k_tile: int) -> TileWork:
        """Return the tiles of adjacent tokens. Raises TooManyTilesError, TooManyClassesError, EvaluationError."""
        key = q_tile, k_tile
        if key not in self._natural:
            grid = TileGrid(self._n_q, self._n_k, q_tile, k_tile)
            alone = not (self.divisors or self.bricks)
            self._natural[key] = count_natural(self._relation, grid, self._origins, alone=alone)
        return self._natural[key]

    # --- in residue classes

    @cached_property
    def divisors(self) -> tuple[int, ...]:
        """The divisors of the relation's congruences of q - k."""
        parts = split(self._relation)
        return tuple(sorted({part.congruence.divisor for part in parts if part.congruence is not None}))

    def by_residues(self, q_tile: int, k_tile: int) -> TileWork:
        """Return the tiles of each residue class, and of other parts in natural order. Raises as `natural`."""
        parts = split(self._relation)
        tile_works: list[TileWork] = []
        for part in parts:
            if part.congruence is None:
                tile_works.append(self._finder(part.relation, self._n_q, self._n_k).natural(q_tile, k_tile))
                continue
            class_counts: dict[tuple[Index, int, int], int] = {}
            for residue in residues(part, self._n_q, self._n_k):
                key = residue.relation, residue.n_q, residue.n_k
                class_counts[key] = class_counts.get(key, 0) + 1
            tile_works += [
                self._finder(*key).natural(q_tile, k_tile).repeated(times) for key, times in class_counts.items()
            ]
        merged = self._n_q if len(parts) > 1 else 0
        return replace(joined(tile_works, Order("residues", divisors=self.divisors), q_tile, k_tile), merged=merged)

    def _finder(self, relation: Index, n_q: int, n_k: int) -> TileFinder:
        key = relation, n_q, n_k
        if key not in self._classes:
            self._classes[key] = TileFinder(relation, n_q, n_k, self._origins)
        return self._classes[key]

    # --- in bricks

    @cached_property
    def bricks(self) -> BrickFinder | None:
        """The finder of the relation's bricks, None without a grid of tokens."""
        return find_bricks(self._relation, self._n_q, self._n_k, self._natural_part)

    def _natural_part(self, relation: Index, n_q: int, n_k: int, q_tile: int, k_tile: int) -> TileWork:
        return self._finder(relation, n_q, n_k).natural(q_tile, k_tile)
