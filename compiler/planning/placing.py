"""Place pieces at many windows at once: equal windows at even steps become the stretches of one piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.hashing import kinds
from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.ir import Index, Truth
from attnc.compiler.planning.cpu_plan import PlanPiece, Strip, strip
from attnc.compiler.planning.documents import Windows
from attnc.compiler.planning.formulas import diagonal_shift
from attnc.compiler.planning.pieces import even_steps

Int64 = NDArray[np.int64]


def place(piece: PlanPiece, windows: Windows) -> Iterator[PlanPiece]:
    """Yield a piece over local rows and keys at every window, windows at even steps as one piece."""
    if len(windows) > 1 and _can_join(piece):
        same_bucket = np.zeros(len(windows), dtype=np.int64)
        for group in even_steps(same_bucket, windows.row, windows.key):
            joined = _moved(piece, windows, group.start)
            count = group.stop - group.start
            if count > 1:
                steps = (int(x[group.start + 1] - x[group.start]) for x in (windows.row, windows.key))
                queries, keys = (
                    _repeated(stretches, step, count)
                    for stretches, step in zip((joined.queries, joined.keys), steps, strict=True)
                )
                joined = replace(joined, queries=queries, keys=keys)
            if all(axis.apart for axis in joined.queries.axes):
                yield joined
            else:
                yield from (_moved(piece, windows, i) for i in range(group.start, group.stop))
    else:
        yield from (_moved(piece, windows, i) for i in range(len(windows)))


def _can_join(piece: PlanPiece) -> bool:
    """Whether copies of a piece may become the stretches of one piece."""
    is_single = len(piece.queries.axes) == len(piece.keys.axes) == 1 and piece.queries.count == 1
    return is_single and piece.mask != "exact"


def _moved(piece: PlanPiece, windows: Windows, i: int) -> PlanPiece:
    """Return the piece over the rows and keys of window i."""
    row, key = int(windows.row[i]), int(windows.key[i])
    if not row and not key:
        return piece
    return replace(piece, queries=piece.queries.moved(row), keys=piece.keys.moved(key))


def _repeated(single: Strip, step: int, count: int) -> Strip:
    """Return the strip of `count` copies of a single stretch, `step` tokens apart."""
    (axis,) = single.axes
    return Strip(single.start, (replace(axis, step=step, count=count),))


@dataclass(frozen=True, slots=True)
class ClosedWindows:
    """The cover of windows of any sizes whose relation has a formula, with the totals of tiles and pairs."""

    pieces: tuple[PlanPiece, ...]
    grid: TileGrid
    full: int
    partial: int
    total: int
    area: int
    visible: int
    reason: str


def closed_windows(relation: Index, windows: Windows) -> Int64:
    """Return the indices of windows that a formula covers: everything is visible, or they are causal squares."""
    if isinstance(relation, Truth):
        return np.arange(len(windows)) if relation.value else np.zeros(0, dtype=np.int64)
    if diagonal_shift(relation) != 0:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(windows.n_q == windows.n_k)


def cover_closed(relation: Index, windows: Windows, tile: int) -> ClosedWindows:
    """Return the cover with a piece for each window; windows of one size at even steps share a piece."""
    causal = not isinstance(relation, Truth)
    tiles_q, tiles_k = -(-windows.n_q // tile), -(-windows.n_k // tile)
    total = int((tiles_q * tiles_k).sum())
    full, live, visible = total, total, windows.area
    if causal:
        # a last tile row with a single row sees all of its keys
        single_last_row = (tiles_q - 1) * tile + 1 == windows.n_q
        full = int((tiles_q * (tiles_q - 1) // 2 + single_last_row).sum())
        live = int((tiles_q * (tiles_q + 1) // 2).sum())
        visible = int((windows.n_q * (windows.n_q + 1) // 2).sum())
    pieces = tuple(_by_size(windows, causal))
    calls = f"{len(windows)} documents in {len(pieces)} piece{'s' if len(pieces) != 1 else ''}"
    grid = TileGrid(int(windows.n_q.max()), int(windows.n_k.max()), tile, tile)
    reason = f"{calls} on tiles of {tile}×{tile}, by formula"
    return ClosedWindows(pieces, grid, full, live - full, total, windows.area, visible, reason)


def _by_size(windows: Windows, causal: bool) -> Iterator[PlanPiece]:
    """Yield the pieces of windows, those of one size at even steps as one piece."""
    size = kinds(windows.n_q * (int(windows.n_k.max()) + 1) + windows.n_k).number
    order = np.argsort(size, kind="stable")
    row, key, n_q, n_k = (x[order] for x in (windows.row, windows.key, windows.n_q, windows.n_k))
    row_list, key_list, n_q_list, n_k_list = (x.tolist() for x in (row, key, n_q, n_k))
    for group in even_steps(size[order], row, key):
        first, count = group.start, group.stop - group.start
        q_step, k_step = (
            (row_list[first + 1] - row_list[first], key_list[first + 1] - key_list[first]) if count > 1 else (0, 0)
        )
        queries = strip(row_list[first], q_step, count, n_q_list[first])
        yield PlanPiece(queries, strip(key_list[first], k_step, count, n_k_list[first]), "causal" if causal else "full")
