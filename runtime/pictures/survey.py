"""Count the visible pairs of a relation exactly, on grids of any step, without an N×N object.

A mask is counted directly. A plan is counted from its pieces: pieces without a mask cost only their outline.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.planning.cpu_plan import Mask, Plan, PlanPiece

Counts = NDArray[np.int64]
Steps = Sequence[tuple[int, int]]
"""Grids, each as the (queries, keys) of a cell."""

_BLOCK = 1 << 22
"""The maximum number of elements in memory at once."""


def count_mask(mask: Mask, steps: Steps) -> list[Counts]:
    """Return, for each grid, the visible pairs in every cell of a mask (queries, keys)."""
    n_q, n_k = mask.shape
    tally = _Tally(n_q, n_k, steps)
    tally.add_mask(0, 0, mask)
    return tally.grids


def count_plan(plan: Plan, batch: int, head: int, steps: Steps) -> list[Counts]:
    """Return, for each grid, the visible pairs in every cell of a head's matrix."""
    tally = _Tally(plan.n_q, plan.n_k, steps)
    for group in plan.groups:
        if batch in group.batches and head in group.heads:
            for piece in group.pieces:
                _add_piece(tally, plan, piece, batch, head)
    return tally.grids


def _add_piece(tally: _Tally, plan: Plan, piece: PlanPiece, batch: int, head: int) -> None:
    rows, columns = piece.queries.length, piece.keys.length
    plain = piece.queries.is_plain and piece.keys.is_plain
    for q, k in zip(piece.queries.starts().tolist(), piece.keys.starts().tolist(), strict=True):
        if not plain:
            _add_scattered(tally, plan, piece, q, k)
            continue
        match piece.mask:
            case "full":
                tally.add_full(q, k, rows, columns)
            case "causal":
                tally.add_causal(q, k, rows)
            case "exact":
                height = max(1, _BLOCK // max(columns, 1))
                for low in range(q, q + rows, height):
                    high = min(low + height, q + rows)
                    tally.add_mask(low, k, plan.exact_mask(batch, head, low, high, k, k + columns))
            case int() as index:
                tally.add_mask(q, k, plan.masks[index].whole())


def _add_scattered(tally: _Tally, plan: Plan, piece: PlanPiece, q: int, k: int) -> None:
    rows, columns = q + piece.queries.inside(), k + piece.keys.inside()
    height = max(1, _BLOCK // max(len(columns), 1))
    for low in range(0, len(rows), height):
        part = rows[low : low + height]
        match piece.mask:
            case int() as index:
                mask = plan.masks[index].whole()[low : low + height]
            case "causal":
                mask = np.tri(len(part), len(columns), low, dtype=np.bool_)
            case _:
                mask = np.ones((len(part), len(columns)), dtype=np.bool_)
        tally.add_scattered(part, columns, mask)


class _Tally:
    """Cell counts that accumulate, one array per grid."""

    def __init__(self, n_q: int, n_k: int, steps: Steps) -> None:
        self.steps = steps
        self.grids = [np.zeros((-(-n_q // a), -(-n_k // b)), dtype=np.int64) for a, b in steps]

    def add_mask(self, q: int, k: int, mask: Mask) -> None:
        """Add a rectangle of pairs with its corner at (q, k)."""
        if mask.size == 0:
            return
        for grid, (q_step, k_step) in zip(self.grids, self.steps, strict=True):
            by_column = np.add.reduceat(mask, _cuts(k, mask.shape[1], k_step), axis=1, dtype=np.int64)
            _add(grid, q // q_step, k // k_step, _by_row(by_column, q, q_step))

    def add_scattered(self, rows: Counts, columns: Counts, mask: Mask) -> None:
        """Add pairs of tokens that are in ascending order but not consecutive."""
        for grid, (q_step, k_step) in zip(self.grids, self.steps, strict=True):
            q_cells, q_cuts = _cells(rows, q_step)
            k_cells, k_cuts = _cells(columns, k_step)
            counts = np.add.reduceat(mask, k_cuts, axis=1, dtype=np.int64)
            grid[np.ix_(q_cells, k_cells)] += np.add.reduceat(counts, q_cuts, axis=0, dtype=np.int64)

    def add_full(self, q: int, k: int, rows: int, columns: int) -> None:
        """Add a rectangle in which all pairs are visible."""
        if rows * columns == 0:
            return
        for grid, (q_step, k_step) in zip(self.grids, self.steps, strict=True):
            heights, widths = _overlaps(q, rows, q_step), _overlaps(k, columns, k_step)
            _add(grid, q // q_step, k // k_step, np.outer(heights, widths))

    def add_causal(self, q: int, k: int, n: int) -> None:
        """Add a square in which row r sees the columns up to r."""
        for grid, (q_step, k_step) in zip(self.grids, self.steps, strict=True):
            widths = _overlaps(k, n, k_step)
            before = np.cumsum(widths) - widths
            height = max(1, _BLOCK // len(widths))
            for low in range(0, n, height):
                row = np.arange(low, min(low + height, n))
                visible = np.clip(row[:, None] + 1 - before, 0, widths)
                _add(grid, (q + low) // q_step, k // k_step, _by_row(visible, q + low, q_step))


def _add(grid: Counts, row: int, column: int, counts: Counts) -> None:
    grid[row : row + counts.shape[0], column : column + counts.shape[1]] += counts


def _by_row(counts: Counts, q: int, step: int) -> Counts:
    return np.add.reduceat(counts, _cuts(q, len(counts), step), axis=0, dtype=np.int64)


def _cells(tokens: Counts, step: int) -> tuple[Counts, Counts]:
    """Return the cells that contain tokens, and the index of the first token in each."""
    cells = tokens // step
    cuts = np.flatnonzero(np.append(True, cells[1:] != cells[:-1]))
    return cells[cuts], cuts


def _cuts(start: int, length: int, step: int) -> NDArray[np.int64]:
    """Return the starts of the cells in a stretch, relative to the start of the stretch."""
    first = (start // step + 1) * step
    return np.append(0, np.arange(first, start + length, step, dtype=np.int64) - start)


def _overlaps(start: int, length: int, step: int) -> Counts:
    """Return the length of the overlap of a stretch with each cell that it meets."""
    return np.diff(np.append(_cuts(start, length, step), length))
