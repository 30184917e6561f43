"""Short documents that stand next to each other, packed into one masked call where that costs less than a call each."""

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
"""Documents of at most this many tokens may be packed."""

ALIKE = 2
"""So many documents of one length in a row are one call already."""

ROWS = (32, 64, 128, 256)
"""Rows that a pack may have."""

SHARED_ELEMENTS = 1 << 22
"""Packs with at most this many mask elements together have their masks made with the plan."""


@dataclass(frozen=True, eq=False)
class Packs:
    """Packs of windows `first ..= last`, by number, and the windows that stay alone."""

    rows: int
    first: Int64
    last: Int64
    alone: Int64
    masks: Literal["exact", "shared"]

    def areas(self, windows: Windows) -> tuple[Int64, Int64, Int64, Int64]:
        """First row and end, first key and end of each pack."""
        a, b = self.first, self.last
        return windows.row[a], (windows.row + windows.n_q)[b], windows.key[a], (windows.key + windows.n_k)[b]


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost model of a call's squares; `own`: the mask of a document's own piece."""

    rates: Rates
    work: PieceWork
    own: Literal["full", "causal"] | int

    def of(self, rows: int, mask: Literal["full", "causal", "exact"] | int) -> float:
        """The estimated time of a square."""
        piece = PlanPiece(stretch(0, rows), stretch(0, rows), mask)
        return self.rates.piece(piece, self.work)


def pack(windows: Windows, costs: Costs) -> Packs | None:
    """The cheapest packs; None where no pack is cheaper than a call for each of its documents."""
    segments = _segments(windows)
    if not len(segments):
        return None
    alone = _alone(windows, costs)
    best: tuple[float, Packs] | None = None
    for rows in ROWS:
        first, last = _greedy(windows, segments, rows)
        for masks in _kinds_of_masks(windows, first, last):
            saved, packs = _worthwhile(windows, rows, first, last, masks, costs, alone)
            if saved > 0 and (best is None or saved > best[0]):
                best = saved, packs
    return None if best is None else best[1]


def _segments(windows: Windows) -> Int64:
    """Numbers of the first and last window of each stretch of adjacent short ones, as rows."""
    short = (windows.n_q <= SHORT) & (windows.n_k <= SHORT) & ~_in_alike(windows)
    adjacent = (windows.row[1:] == (windows.row + windows.n_q)[:-1]) & (
        windows.key[1:] == (windows.key + windows.n_k)[:-1]
    )
    joined = adjacent & short[1:] & short[:-1]
    first = np.flatnonzero(short & ~np.append(False, joined))
    last = np.flatnonzero(short & ~np.append(joined, False))
    some = last > first
    return np.stack([first[some], last[some]], axis=1)


def _in_alike(windows: Windows) -> NDArray[np.bool_]:
    """Whether a window is one of ALIKE or more of one size in a row."""
    same = (windows.n_q[1:] == windows.n_q[:-1]) & (windows.n_k[1:] == windows.n_k[:-1])
    starts = np.flatnonzero(np.append(True, ~same))
    length = np.diff(np.append(starts, len(windows)))
    return np.repeat(length >= ALIKE, length)


def _greedy(windows: Windows, segments: Int64, rows: int) -> tuple[Int64, Int64]:
    """As many windows in each pack as `rows` rows hold, one at least."""
    limits = np.searchsorted(windows.row + windows.n_q, windows.row + rows, side="right").tolist()
    first, last = [], []
    for start, stop in segments.tolist():
        at = start
        while at <= stop:
            end = max(min(limits[at], stop + 1), at + 1)
            first.append(at)
            last.append(end - 1)
            at = end
    return np.array(first, dtype=np.int64), np.array(last, dtype=np.int64)


def _kinds_of_masks(windows: Windows, first: Int64, last: Int64) -> Sequence[Literal["exact", "shared"]]:
    height = (windows.row + windows.n_q)[last] - windows.row[first]
    width = (windows.key + windows.n_k)[last] - windows.key[first]
    return ("shared",) if int((height * width).sum()) <= SHARED_ELEMENTS else ("exact",)


def _alone(windows: Windows, costs: Costs) -> NDArray[np.float64]:
    """The running sum of the estimated times of short windows, a call each."""
    by_rows = np.array([costs.of(max(rows, 1), costs.own) for rows in range(SHORT + 1)])
    size = np.minimum(np.maximum(windows.n_q, windows.n_k), SHORT)
    shares = np.minimum(np.bincount(size)[size], 2)  # any two documents of one length are one call
    call = costs.rates.call
    return np.append(0.0, np.cumsum(by_rows[size] - call + call / shares))


def _worthwhile(
    windows: Windows,
    rows: int,
    first: Int64,
    last: Int64,
    masks: Literal["exact", "shared"],
    costs: Costs,
    alone: NDArray[np.float64],
) -> tuple[float, Packs]:
    """The packs that cost less than their windows alone, and what they save."""
    height = (windows.row + windows.n_q)[last] - windows.row[first]
    width = (windows.key + windows.n_k)[last] - windows.key[first]
    call = costs.rates.call
    by_area = (costs.of(rows, "exact" if masks == "exact" else 0) - call) / rows**2
    saved = alone[last + 1] - alone[first] - (call + by_area * height * width)
    good = (saved > 0) & (last > first)
    packed = np.zeros(len(windows) + 1, dtype=np.int64)
    np.add.at(packed, first[good], 1)
    np.add.at(packed, last[good] + 1, -1)
    rest = np.flatnonzero(np.cumsum(packed)[:-1] == 0)
    return float(saved[good].sum()), Packs(rows, first[good], last[good], rest, masks)
