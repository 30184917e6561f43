"""Covers by formula, without visiting a tile: everything, nothing, and the half plane under a diagonal."""

from __future__ import annotations

import numpy as np

from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.ir import Compare, Index, Linear, Position, Truth
from attnc.compiler.planning.cpu_plan import PlanPiece, stretch
from attnc.compiler.planning.pieces import Cover


def diagonal_shift(relation: Index) -> int | None:
    """Return the c of a relation `k <= q + c`, None for any other relation."""
    if not (isinstance(relation, Compare) and relation.op == "ge" and isinstance(relation.value, Linear)):
        return None
    terms = {term.name: factor for term, factor in relation.value.terms if isinstance(term, Position)}
    is_half_plane = len(relation.value.terms) == 2 and terms == {"q": 1, "k": -1}
    return relation.value.constant if is_half_plane else None


def closed_cover(relation: Index, grid: TileGrid) -> Cover | None:
    """Return the cover of a relation by a formula, None if no formula covers it."""
    if isinstance(relation, Truth):
        return _everything(grid) if relation.value else Cover((), (), 0, 0, 0)
    shift = diagonal_shift(relation)
    return None if shift is None else _half_plane(grid, shift)


def _everything(grid: TileGrid) -> Cover:
    if not grid.n_q or not grid.n_k:
        return Cover((), (), 0, 0, 0)
    piece = PlanPiece(stretch(0, grid.n_q), stretch(0, grid.n_k), "full")
    return Cover((piece,), (), grid.rows * grid.columns, 0, grid.n_q * grid.n_k)


def _half_plane(grid: TileGrid, shift: int) -> Cover:
    """Return the cover where row r sees keys up to r + shift: a triangle, the rectangle left of it, and full rows."""
    n_q, n_k = grid.n_q, grid.n_k
    first = min(max(0, -shift), n_q)
    last = min(max(first, min(n_q, n_k - shift)), n_q)
    pieces = []
    if last > first:
        rows = stretch(first, last)
        pieces.append(PlanPiece(rows, stretch(first + shift, last + shift), "causal"))
        if first + shift > 0:
            pieces.append(PlanPiece(rows, stretch(0, first + shift), "full", fresh=False))
    if n_q > last and n_k:
        pieces.append(PlanPiece(stretch(last, n_q), stretch(0, n_k), "full"))
    visible = (last - first) * (first + last + 2 * shift + 1) // 2 + (n_q - last) * n_k
    full, live = _tiles(grid, shift)
    return Cover(tuple(sorted(pieces, key=lambda p: not p.fresh)), (), full, live - full, visible)


def _tiles(grid: TileGrid, shift: int) -> tuple[int, int]:
    """Return the numbers of full and of live tiles under the diagonal."""
    if not grid.n_q or not grid.n_k:
        return 0, 0
    first = np.arange(grid.rows, dtype=np.int64) * grid.q_tile
    last = np.minimum(first + grid.q_tile, grid.n_q) - 1
    columns = grid.columns
    reach, all_reach = last + shift, first + shift
    live = np.where(reach < 0, 0, np.clip((reach - grid.k_origin) // grid.k_tile + 1, 0, columns))
    full = np.where(all_reach < 0, 0, np.clip((all_reach + 1 - grid.k_origin) // grid.k_tile, 0, columns))
    full = np.where(all_reach >= grid.n_k - 1, columns, full)
    return int(full.sum()), int(live.sum())
