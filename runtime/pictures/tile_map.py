"""The tiles of a pattern at the length of a real call, in token order and in bricks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.planning.tile_work import NATURAL, Order
from attnc.compiler.simulation.orders import TileFinder
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.call_shapes import TensorSizes, shape_of_call
from attnc.runtime.pictures.draw import DrawnHead, count_pairs, drawn_case, states_of, subtitle_of, tile_side
from attnc.runtime.pictures.drawing import EMPTY, FULL, PARTIAL, coarsening, extents, means
from attnc.runtime.planning.call_relations import relations_of

if TYPE_CHECKING:
    from attnc.compiler.planning.brick_work import BrickFinder
    from attnc.runtime.patterns.pattern_analysis import PatternAnalysis

ACROSS = 128
"""The maximum number of squares along a side of a view; more tiles are merged."""


@dataclass(frozen=True, slots=True, eq=False)
class TileView:
    """The state of every tile of `tile` queries by `tile` keys, in an order of the tokens."""

    order: Order
    tile: int
    states: NDArray[np.int8]

    def count(self, state: int) -> int:
        """Return the number of tiles in a state."""
        return int((self.states == state).sum())

    @property
    def live(self) -> int:
        """The number of tiles that are not empty."""
        return int((self.states != EMPTY).sum())

    @property
    def factor(self) -> int:
        """The number of tiles along a side of a drawn square, a power of two."""
        return coarsening(max(self.states.shape), ACROSS)

    @property
    def tiles_text(self) -> str:
        """The numbers of live, full and partial tiles as text."""
        share = self.live / max(self.states.size, 1)
        live = f"{self.live:,} of {self.states.size:,} tiles live ({100 * share:.3g} %)"
        return f"{live}: {self.count(FULL):,} full, {self.count(PARTIAL):,} partial"

    def shares(self, factor: int | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the shares of live tiles and of full tiles in each square of `factor` by `factor` tiles.

        None: `self.factor`, as in the SVG.
        """
        factor = self.factor if factor is None else factor
        live, full = ((self.states != EMPTY).astype(np.int64), (self.states == FULL).astype(np.int64))
        return means(live, factor), means(full, factor)


@dataclass(frozen=True, slots=True, eq=False)
class TileMap:
    """The tiles of a head of a pattern, in each drawn order of its tokens; the best order comes last."""

    title: str
    subtitle: str
    n_q: int
    n_k: int
    views: tuple[TileView, ...]
    notes: tuple[str, ...]

    @property
    def size_text(self) -> str:
        """The numbers of queries and keys as text."""
        return f"{self.n_q:,} queries × {self.n_k:,} keys"


_NONE: Mapping[str, object] = {}


def make_tile_map(
    attention: PatternAnalysis,
    n_q: int,
    n_k: int,
    inputs: Mapping[str, object] = _NONE,
    *,
    head: int = 0,
    tile: int | None = None,
) -> TileMap:
    """Return the tiles of a head, of the first batch entry; exact, from the plan's tiles and never from all pairs.

    Inputs that are not given get example values, which the notes name. `tile` is the side of a tile, by default 128 or
    less at short lengths. A relation on a grid of tokens also has a view in bricks, if fewer bricks are live. Raises
    the errors of a call with these sizes, and ArgumentError for keys that are not tokens.
    """
    if any(node.keys is not None for node in attention.pattern.nodes):
        raise ArgumentError(
            f"the keys of `{attention.name}` are not tokens, so it has no map of tiles; use `attnc show` without "
            f"--tiles"
        )
    tile = tile_side(n_q, n_k, tile)
    case = drawn_case(attention, n_q, n_k, inputs, head)
    (pairs,) = count_pairs(attention, n_q, n_k, case, ((tile, tile),))
    natural = TileView(NATURAL, tile, states_of(pairs, np.outer(extents(n_q, tile), extents(n_k, tile))))
    in_bricks = _in_bricks(attention, n_q, n_k, case, tile)
    best = in_bricks if in_bricks is not None and in_bricks.live < natural.live else None
    views = (natural,) if best is None else (natural, best)
    return TileMap(attention.name, subtitle_of(attention.bound, case), n_q, n_k, views, case.notes)


def _in_bricks(attention: PatternAnalysis, n_q: int, n_k: int, case: DrawnHead, tile: int) -> TileView | None:
    """Return the view in bricks, None if the relation is not on a single grid."""
    finder = _bricks_of(attention, n_q, n_k, case) if n_q == n_k and tile & (tile - 1) == 0 else None
    if finder is None:
        return None
    q_brick, k_brick = finder.best(tile, tile)[0]
    pairs = finder.pairs(q_brick, k_brick)
    return None if pairs is None else TileView(Order("bricks", q_brick, k_brick), tile, states_of(*pairs))


def _bricks_of(attention: PatternAnalysis, n_q: int, n_k: int, case: DrawnHead) -> BrickFinder | None:
    pattern = attention.pattern
    if len(pattern.nodes) > 1 or pattern.selections or pattern.documents is not None:
        return None
    sizes = TensorSizes(n_q, n_k, 1, case.heads, case.heads, 64, 64, "float32")
    relations = relations_of(pattern, shape_of_call(pattern, sizes, case.inputs))
    local, *more = relations.locals(0, case.head, cut=False)
    if more or len(local.windows) > 1:
        return None
    return TileFinder(local.relation, n_q, n_k, pattern.origins).bricks
