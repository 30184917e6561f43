"""Bounds of an array over ranges of its indices, for token attributes that a relation reads."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.hashing import Hash, combine, kinds, mix
from attnc.compiler.ir import Data

Int64 = NDArray[np.int64]
Range = tuple[Int64, Int64]

_FINE = 1 << 15
_BLOCK = 64
_HASHED = 1 << 18
"""Maximum number of entries to hash at once."""
_FEW = 4
"""Maximum number of entries of a short range."""


class RangeTable:
    """Sparse tables of minima and maxima along the axis whose index varies; constant indices pick a slice.

    Ranges are widened to whole blocks (of one entry in short arrays, else of 64 entries) and, where the indices of
    several axes vary, to the whole array unless they have few entries. Widened bounds remain valid.
    """

    def __init__(self, data: Data) -> None:
        self._array = data.array
        self._lines: dict[tuple[int | None, ...], _LineTables] = {}

    @classmethod
    def of(cls, data: Data) -> RangeTable:
        """Return the table of an input, made once and cached with the data."""
        table = data.cache.get("range table")
        if not isinstance(table, RangeTable):
            data.cache["range table"] = table = cls(data)
        return table

    def bounds(self, ranges: list[Range]) -> Range:
        """Return minimum and maximum over index ranges (ends included, clipped to the array), one range per axis."""
        if self._array.size == 0:
            return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        points = tuple(_point(r, n) for r, n in zip(ranges, self._array.shape, strict=True))
        varying = [axis for axis, point in enumerate(points) if point is None]
        if len(varying) > 1:
            return self._corner_bounds(ranges)
        line = self._line(points)
        if not varying:
            return line.bounds(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))
        return line.bounds(*ranges[varying[0]])

    def _corner_bounds(self, ranges: list[Range]) -> Range:
        """The bounds over ranges of up to `_FEW` entries per axis, entry by entry; others get the whole array's."""
        inside = [
            tuple(np.clip(end, 0, n - 1) for end in ends) for ends, n in zip(ranges, self._array.shape, strict=True)
        ]
        few = np.logical_and.reduce(np.broadcast_arrays(*(high - low < _FEW for low, high in inside)))
        total_bounds = np.full(few.shape, self._ends[0]), np.full(few.shape, self._ends[1])
        if not few.any():
            return total_bounds
        widest = [int((high - low)[high - low < _FEW].max(initial=0)) for low, high in inside]
        corners = [
            self._array[tuple(np.minimum(low + i, high) for i, (low, high) in zip(step, inside, strict=True))]
            for step in np.ndindex(*(width + 1 for width in widest))
        ]
        least, greatest = np.minimum.reduce(corners), np.maximum.reduce(corners)
        return np.where(few, least, total_bounds[0]), np.where(few, greatest, total_bounds[1])

    @cached_property
    def _ends(self) -> tuple[int, int]:
        """The least and the greatest entry, cached so that a large array is read once."""
        return int(self._array.min()), int(self._array.max())

    def contents(self, first: Int64, last: Int64) -> tuple[Hash, Int64]:
        """Return, for ranges inside a one-axis array, a hash of the entries less the first, and the first entry."""
        return self._line((None,)).contents(first, last)

    def _line(self, points: tuple[int | None, ...]) -> _LineTables:
        if points not in self._lines:
            indices = tuple(slice(None) if p is None else p for p in points)
            self._lines[points] = _LineTables(np.atleast_1d(self._array[indices]).astype(np.int64))
        return self._lines[points]


def _point(r: Range, size: int) -> int | None:
    low, high = int(r[0].min()), int(r[1].max())
    return min(max(low, 0), size - 1) if low == high else None


class _LineTables:
    """Sparse tables over a one-dimensional array."""

    def __init__(self, line: Int64) -> None:
        self._block = 1 if len(line) <= _FINE else _BLOCK
        self._size = len(line)
        self._entries = line
        starts = np.arange(0, len(line), self._block)
        self._low = _doubled(np.minimum, np.minimum.reduceat(line, starts))
        self._high = _doubled(np.maximum, np.maximum.reduceat(line, starts))

    def bounds(self, first: Int64, last: Int64) -> Range:
        a = np.clip(first, 0, self._size - 1) // self._block
        b = np.maximum(np.clip(last, 0, self._size - 1) // self._block, a)
        level = np.frexp((b - a + 1).astype(np.float64))[1] - 1
        other = b - (np.int64(1) << level.astype(np.int64)) + 1
        low = np.minimum(self._low[level, a], self._low[level, other])
        return low, np.maximum(self._high[level, a], self._high[level, other])

    def contents(self, first: Int64, last: Int64) -> tuple[Hash, Int64]:
        """Return a hash of the entries of each range less its first entry, and the first entry."""
        first, last = np.broadcast_arrays(first, last)
        distinct = kinds(first * np.int64(self._size) + last)
        starts, ends = first[distinct.first], last[distinct.first]
        longest = int((ends - starts).max(initial=0)) + 1
        chunk = max(1, _HASHED // longest)
        hashes = [
            self._hashes(starts[i : i + chunk], ends[i : i + chunk], longest) for i in range(0, len(starts), chunk)
        ]
        return np.concatenate(hashes)[distinct.number], self._entries[first]

    def _hashes(self, first: Int64, last: Int64, longest: int) -> Hash:
        offsets = np.arange(longest)
        indices = first[:, None] + offsets
        inside_range = indices <= last[:, None]
        entries = self._entries[np.minimum(indices, last[:, None])] - self._entries[first][:, None]
        entry_hashes = combine(mix(offsets), mix(entries))
        total = np.where(inside_range, entry_hashes, np.uint64(0)).sum(axis=1, dtype=np.uint64)
        return combine(total, mix(last - first))


def _doubled(extreme: np.ufunc, line: Int64) -> NDArray[np.int64]:
    """Build a sparse table: row l holds the extreme over 2^l entries from each start (clipped at the end)."""
    rows = [line]
    while 2 ** len(rows) <= len(line):
        previous, step = rows[-1], 2 ** (len(rows) - 1)
        shifted = np.concatenate([previous[step:], np.full(step, previous[-1])])
        rows.append(extreme(previous, shifted))
    return np.stack(rows)
