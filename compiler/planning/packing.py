"""Pack adjacent short documents into one masked call where that is cheaper than a call for each document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.planning.cpu_plan import PlanPiece, stretch
from attnc.compiler.planning.documents import Windows
from attnc.compiler.planning.rates import PieceWork, Rates

Int64 = NDArray[np.int64]

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
