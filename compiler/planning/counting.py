"""Pairs of a relation counted exactly where the tiles of its plan do not say how many there are."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

from attnc.compiler.analysis.aggregates import TooManyStepsError
from attnc.compiler.analysis.grid import TileGrid
from attnc.compiler.analysis.live_tiles import TooManyTilesError, find_live_tiles
from attnc.compiler.ir import Index
from attnc.compiler.planning.runs import TooManyClassesError, resolve
from attnc.compiler.planning.schedule import blocks
from attnc.spec.source import Span

TILES = range(16, 257)
"""Sides of the tiles that are counted."""

MOST_TILES = 1 << 19
"""Tiles that counting looks at in one level, at most."""

MOST_CLASS_ELEMENTS = 1 << 24
"""Mask elements that counting evaluates, at most."""


def visible_pairs(relation: Index, n_q: int, n_k: int, origins: Mapping[Index, Span]) -> int | None:
    """Count the visible pairs of a relation; None where counting would take long.

    Tiles whose side divides what the relation divides positions by meet its steps in their corners only, so that few
    kinds of tiles are unlike each other: one of each kind is counted.
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
    """Sides of tiles to try: the largest divisor of what positions are divided by, all together and one by one."""
    periods = sorted((n for n in blocks(relation) if n >= TILES.start), reverse=True)
    together = [gcd(*periods)] if periods else []
    sides = [max((side for side in TILES if n % side == 0), default=0) for n in (*together, *periods)]
    return list(dict.fromkeys(side for side in sides if side))[:2]
