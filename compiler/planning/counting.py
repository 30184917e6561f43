"""Count the visible pairs of a relation exactly where the tiles of its plan leave them uncounted."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

from attnc.compiler.analysis.grid import TileGrid
from attnc.compiler.analysis.live_tiles import TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index
from attnc.compiler.ir.aggregates import TooManyStepsError
from attnc.compiler.planning.runs import TooManyClassesError, resolve
from attnc.compiler.planning.schedule import blocks
from attnc.spec.source import Span

TILES = range(16, 257)
"""Sides of tiles that may be used for counting."""

MOST_TILES = 1 << 19
"""Maximum number of tiles that counting visits on one level."""

MOST_CLASS_ELEMENTS = 1 << 24
"""Maximum number of mask elements that counting evaluates."""


def visible_pairs(relation: Index, n_q: int, n_k: int, origins: Mapping[Index, Span]) -> int | None:
    """Count the visible pairs of a relation; None where counting would take long.

    Where the side of the tiles divides the constants by which the relation divides positions, steps of the relation
    meet tiles in their corners only. Then few classes of tiles differ, and one tile of each class is counted.
    """
    for side in _sides(relation):
        grid = TileGrid(n_q, n_k, side, side)
        try:
            tiles = find_live_tiles(relation, grid, MOST_TILES)
            return resolve(relation, tiles, origins, most_elements=MOST_CLASS_ELEMENTS).visible
        except (TooManyTilesError, TooManyClassesError, TooManyStepsError):
            continue
    return None


def _sides(relation: Index) -> list[int]:
    """Return the sides of tiles to try: the largest divisors of the relation's divisors, jointly and one by one."""
    periods = sorted((n for n in blocks(relation) if n >= TILES.start), reverse=True)
    common = [gcd(*periods)] if periods else []
    sides = [max((side for side in TILES if n % side == 0), default=0) for n in (*common, *periods)]
    return list(dict.fromkeys(side for side in sides if side))[:2]
