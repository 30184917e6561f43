"""The live tiles of a relation in every order of its tokens: as they stand, in bricks of a grid, in residue classes."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.ir import Index
from attnc.compiler.planning.residues import residues, split
from attnc.compiler.simulation.brick_work import BrickFinder, find_bricks
from attnc.compiler.simulation.natural_tiles import Origins, count_natural
from attnc.compiler.simulation.tile_work import Order, TileWork, joined


class TileFinder:
    """The tiles of a specialised relation over n_q rows and n_k keys, in every order that it has."""

    def __init__(self, relation: Index, n_q: int, n_k: int, origins: Origins) -> None:
        self._relation, self._n_q, self._n_k, self._origins = relation, n_q, n_k, origins
        self._natural: dict[tuple[int, int], TileWork] = {}
        self._classes: dict[object, TileFinder] = {}

    # --- as they stand

    def natural(self, q_tile: int, k_tile: int) -> TileWork:
        """Tiles of adjacent tokens. Raises TooManyTilesError, TooManyClassesError, EvaluationError."""
        key = q_tile, k_tile
        if key not in self._natural:
            grid = TileGrid(self._n_q, self._n_k, q_tile, k_tile)
            alone = not (self.divisors or self.bricks)
            self._natural[key] = count_natural(self._relation, grid, self._origins, alone=alone)
        return self._natural[key]

    # --- in classes of residues

    @cached_property
    def divisors(self) -> tuple[int, ...]:
        """The divisors of the congruences of q - k in the relation."""
        parts = split(self._relation)
        return tuple(sorted({part.congruence.divisor for part in parts if part.congruence is not None}))

    def by_residues(self, q_tile: int, k_tile: int) -> TileWork:
        """Each class of residues in an order of its own, what has no congruence as it stands. Raises as `natural`."""
        parts = split(self._relation)
        tile_works: list[TileWork] = []
        for part in parts:
            if part.congruence is None:
                tile_works.append(self._of(part.relation, self._n_q, self._n_k).natural(q_tile, k_tile))
                continue
            alike: dict[tuple[Index, int, int], int] = {}
            for one in residues(part, self._n_q, self._n_k):
                key = one.relation, one.n_q, one.n_k
                alike[key] = alike.get(key, 0) + 1
            tile_works += [self._of(*key).natural(q_tile, k_tile).repeated(times) for key, times in alike.items()]
        merged = self._n_q if len(parts) > 1 else 0
        return replace(joined(tile_works, Order("residues", divisors=self.divisors), q_tile, k_tile), merged=merged)

    def _of(self, relation: Index, n_q: int, n_k: int) -> TileFinder:
        key = relation, n_q, n_k
        if key not in self._classes:
            self._classes[key] = TileFinder(relation, n_q, n_k, self._origins)
        return self._classes[key]

    # --- in bricks

    @cached_property
    def bricks(self) -> BrickFinder | None:
        """The relation by bricks of its grid, where it has one."""
        return find_bricks(self._relation, self._n_q, self._n_k, self._natural_of)

    def _natural_of(self, relation: Index, n_q: int, n_k: int, q_tile: int, k_tile: int) -> TileWork:
        return self._of(relation, n_q, n_k).natural(q_tile, k_tile)
