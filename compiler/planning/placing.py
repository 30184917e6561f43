"""Place pieces at many windows at once: equal windows at even steps become the stretches of one piece.

Adjacent short documents are packed into one masked call where that is cheaper than a call for each document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.hashing import kinds
from attnc.compiler.analysis.live_tiles import TileGrid
from attnc.compiler.ir import Index, Truth
from attnc.compiler.planning.cpu_plan import PlanPiece, Strip, stretch, strip
from attnc.compiler.planning.documents import Windows
from attnc.compiler.planning.formulas import diagonal_shift
from attnc.compiler.planning.pieces import even_steps
from attnc.compiler.planning.rates import PieceWork, Rates

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


SHORT = 128
"""Maximum number of tokens of a document that may be packed."""

ALIKE = 2
"""Number of consecutive documents of equal length from which they are not packed: they are one call already."""

ROWS = (32, 64, 128, 256)
"""Numbers of rows to try for packs."""

SHARED_ELEMENTS = 1 << 22
"""Maximum number of mask elements of all packs up to which the plan holds the masks."""


@dataclass(frozen=True, eq=False)
class Packs:
    """Packs, each of the windows `first ..= last`, and the indices of the windows that stay alone.

    `rows`: the maximum number of rows of a pack. `masks`: evaluated as the pieces run, or shared and held by the plan.
    """

    rows: int
    first: Int64
    last: Int64
    alone: Int64
    masks: Literal["exact", "shared"]

    def areas(self, windows: Windows) -> tuple[Int64, Int64, Int64, Int64]:
        """Return the row range and the key range of each pack: first row, stop, first key, stop."""
        a, b = self.first, self.last
        return windows.row[a], (windows.row + windows.n_q)[b], windows.key[a], (windows.key + windows.n_k)[b]


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost model of square pieces; `own`: the mask of the piece of a document that is not packed."""

    rates: Rates
    work: PieceWork
    own: Literal["full", "causal"] | int

    def of(self, rows: int, mask: Literal["full", "causal", "exact"] | int) -> float:
        """Return the estimated nanoseconds of a square piece of `rows` rows and keys."""
        piece = PlanPiece(stretch(0, rows), stretch(0, rows), mask)
        return self.rates.piece(piece, self.work)


def pack(windows: Windows, costs: Costs) -> Packs | None:
    """Return the cheapest packs; None if no pack is cheaper than a call for each of its documents."""
    segments = _segments(windows)
    if not len(segments):
        return None
    separate_times = _separate_times(windows, costs)
    best: tuple[float, Packs] | None = None
    for rows in ROWS:
        first, last = _greedy(windows, segments, rows)
        for masks in _mask_kinds(windows, first, last):
            saved, packs = _worthwhile(windows, rows, first, last, masks, costs, separate_times)
            if saved > 0 and (best is None or saved > best[0]):
                best = saved, packs
    return None if best is None else best[1]


def _segments(windows: Windows) -> Int64:
    """Return the indices of the first and last window of each stretch of adjacent short windows: (stretches, 2)."""
    short = (windows.n_q <= SHORT) & (windows.n_k <= SHORT) & ~_is_in_sequence(windows)
    adjacent = (windows.row[1:] == (windows.row + windows.n_q)[:-1]) & (
        windows.key[1:] == (windows.key + windows.n_k)[:-1]
    )
    joined = adjacent & short[1:] & short[:-1]
    first = np.flatnonzero(short & ~np.append(False, joined))
    last = np.flatnonzero(short & ~np.append(joined, False))
    several = last > first
    return np.stack([first[several], last[several]], axis=1)


def _is_in_sequence(windows: Windows) -> NDArray[np.bool_]:
    """Mark the windows that are among ALIKE or more consecutive windows of one size."""
    same = (windows.n_q[1:] == windows.n_q[:-1]) & (windows.n_k[1:] == windows.n_k[:-1])
    starts = np.flatnonzero(np.append(True, ~same))
    length = np.diff(np.append(starts, len(windows)))
    return np.repeat(length >= ALIKE, length)


def _greedy(windows: Windows, segments: Int64, rows: int) -> tuple[Int64, Int64]:
    """Return the first and last window of packs that hold as many windows as fit into `rows` rows, at least one."""
    limits = np.searchsorted(windows.row + windows.n_q, windows.row + rows, side="right").tolist()
    first, last = [], []
    for segment_first, segment_last in segments.tolist():
        window = segment_first
        while window <= segment_last:
            end = max(min(limits[window], segment_last + 1), window + 1)
            first.append(window)
            last.append(end - 1)
            window = end
    return np.array(first, dtype=np.int64), np.array(last, dtype=np.int64)


def _mask_kinds(windows: Windows, first: Int64, last: Int64) -> Sequence[Literal["exact", "shared"]]:
    """Return the kinds of masks to try for these packs."""
    height = (windows.row + windows.n_q)[last] - windows.row[first]
    width = (windows.key + windows.n_k)[last] - windows.key[first]
    return ("shared",) if int((height * width).sum()) <= SHARED_ELEMENTS else ("exact",)


def _separate_times(windows: Windows, costs: Costs) -> NDArray[np.float64]:
    """Return the running sum of the estimated times of windows if each is a call of its own."""
    by_rows = np.array([costs.of(max(rows, 1), costs.own) for rows in range(SHORT + 1)])
    size = np.minimum(np.maximum(windows.n_q, windows.n_k), SHORT)
    shares = np.minimum(np.bincount(size)[size], 2)  # two documents of one length, wherever they are, share a call
    call = costs.rates.call
    return np.append(0.0, np.cumsum(by_rows[size] - call + call / shares))


def _worthwhile(
    windows: Windows,
    rows: int,
    first: Int64,
    last: Int64,
    masks: Literal["exact", "shared"],
    costs: Costs,
    separate_times: NDArray[np.float64],
) -> tuple[float, Packs]:
    """Return the nanoseconds saved by the packs that are cheaper than their windows alone, and these packs."""
    height = (windows.row + windows.n_q)[last] - windows.row[first]
    width = (windows.key + windows.n_k)[last] - windows.key[first]
    call = costs.rates.call
    by_area = (costs.of(rows, "exact" if masks == "exact" else 0) - call) / rows**2
    saved = separate_times[last + 1] - separate_times[first] - (call + by_area * height * width)
    is_cheaper = (saved > 0) & (last > first)
    packed = np.zeros(len(windows) + 1, dtype=np.int64)
    np.add.at(packed, first[is_cheaper], 1)
    np.add.at(packed, last[is_cheaper] + 1, -1)
    unpacked = np.flatnonzero(np.cumsum(packed)[:-1] == 0)
    return float(saved[is_cheaper].sum()), Packs(rows, first[is_cheaper], last[is_cheaper], unpacked, masks)
