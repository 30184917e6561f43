"""Tile grids drawn by hypothesis, and their tiles by brute force."""

from __future__ import annotations

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.ir import Index
from attnc.spec.errors import EvaluationError


@st.composite
def grids(draw: st.DrawFn) -> TileGrid:
    sizes = st.one_of(st.integers(1, 300), st.sampled_from([1, 31, 64, 65, 127, 128, 129, 256]))
    k_tile = draw(st.sampled_from([8, 13, 16, 32, 64]))
    q_tile = k_tile if draw(st.booleans()) else draw(st.sampled_from([8, 16, 24, 64]))
    origin = -draw(st.integers(0, k_tile - 1)) if draw(st.booleans()) else 0
    return TileGrid(draw(sizes), draw(sizes), q_tile, k_tile, origin)


def mask_of(relation: Index, grid: TileGrid) -> NDArray[np.bool_]:
    try:
        return exact_evaluation.mask(relation, (0, grid.n_q), (0, grid.n_k))
    except EvaluationError:
        assume(False)
        raise


def tile_classes(mask: NDArray[np.bool_], grid: TileGrid) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Return the full and partial tiles by brute force."""
    full, partial = set(), set()
    for row in range(grid.rows):
        for column in range(grid.columns):
            part = mask[slice(*grid.row_range(row)), slice(*grid.key_range(column))]
            if part.all():
                full.add((row, column))
            elif part.any():
                partial.add((row, column))
    return full, partial
