"""Documents: contiguous runs of tokens with one id, each a separate sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.hashing import kinds
from attnc.compiler.lowering.specialise import Window

Int64 = NDArray[np.int64]

_NONE: Int64 = np.zeros(0, dtype=np.int64)


class DocumentsNotContiguousError(Exception):
    """A document id appears again after another id. `position`: where; `identity`: the id."""

    def __init__(self, position: int, identity: int) -> None:
        self.position = position
        self.identity = identity
        super().__init__(f"document {identity} appears again at position {position}")


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows sorted by row, as arrays: first row and key, numbers of rows and keys, position of the first query."""

    row: Int64
    key: Int64
    n_q: Int64
    n_k: Int64
    shift: Int64

    @classmethod
    def of(cls, *windows: Window) -> Windows:
        """Return the windows as arrays; they must be sorted by row."""
        fields = [[getattr(w, f) for w in windows] for f in ("row", "key", "n_q", "n_k", "shift")]
        return cls(*(np.array(values, dtype=np.int64) for values in fields))

    @classmethod
    def joined(cls, parts: Sequence[Windows]) -> Windows:
        """Return the concatenated windows of all parts."""
        columns = zip(*(part._columns for part in parts), strict=True) if parts else [[_NONE]] * 5
        return cls(*(np.concatenate(column) for column in columns))

    def __len__(self) -> int:
        return len(self.row)

    def __iter__(self) -> Iterator[Window]:
        return map(Window, *(x.tolist() for x in self._columns))

    @property
    def _columns(self) -> tuple[Int64, ...]:
        return self.row, self.key, self.n_q, self.n_k, self.shift

    def take(self, which: Int64) -> Windows:
        """Return the windows with these indices."""
        return Windows(*(x[which] for x in self._columns))

    def by_size(self) -> list[Int64]:
        """Return the indices of the windows of each size and shift, one array for each."""
        if len(self) == 1:
            return [np.zeros(1, dtype=np.int64)]
        sizes = [kinds(x) for x in (self.n_q, self.n_k, self.shift)]
        name = np.zeros(len(self), dtype=np.int64)
        for size in sizes:
            name = name * max(len(size.first), 1) + size.number
        return alike(name)

    @cached_property
    def contents(self) -> bytes:
        """Bytes that are equal for equal windows."""
        return b"".join(x.tobytes() for x in self._columns)

    @property
    def area(self) -> int:
        """The number of pairs of a query and a key in the same window."""
        return int((self.n_q * self.n_k).sum())


def alike(names: Int64) -> list[Int64]:
    """Return the indices of equal entries, one array for each value, in the order of first occurrence."""
    groups = kinds(names)
    order = np.argsort(groups.number, kind="stable")
    return np.split(order, np.cumsum(groups.members)[:-1]) if len(names) else []


def whole(n_q: int, n_k: int, align: Literal["start", "end"] | None) -> Window:
    """Return the window of all tokens; under `align end` the last query has the position of the last key."""
    return Window(0, 0, n_q, n_k, n_k - n_q if align == "end" else 0)


def document_windows(ids: NDArray[Any], n_q: int, align: Literal["start", "end"] | None) -> Windows:
    """Return a window for each document that has queries in this call, from the ids of the keys.

    Raises DocumentsNotContiguousError.
    """
    n_k = len(ids)
    if n_k == 0:
        return Windows.of()
    starts = np.append(0, np.flatnonzero(ids[1:] != ids[:-1]) + 1)
    _check_contiguous(ids[starts], starts)
    ends = np.append(starts[1:], n_k)
    offset = n_k - n_q if align == "end" else 0
    first, last = np.maximum(starts - offset, 0), np.minimum(ends - offset, n_q)
    windows = Windows(first, starts, last - first, ends - starts, first + offset - starts)
    return windows.take(np.flatnonzero(last > first))


class BoundariesError(Exception):
    """Invalid cumulative lengths. The message completes a sentence about the input: "is …", "decreases …"."""


def packed_windows(boundaries: NDArray[Any], n_q: int, n_k: int, align: Literal["start", "end"] | None) -> Windows:
    """Return a window for each sequence between two boundaries with queries in this call; empty sequences have none.

    Raises BoundariesError.
    """
    ends = boundaries.astype(np.int64)
    if ends[:1].tolist() != [0] or ends[-1:].tolist() != [n_k]:
        raise BoundariesError(f"is {_abridged(ends)}: it must start at 0 and end at the number of keys, {n_k}")
    falls = np.flatnonzero(np.diff(ends) < 0)
    if len(falls):
        raise BoundariesError(
            f"decreases after entry {falls[0]}, {_abridged(ends)}: pass cumulative lengths, which never decrease"
        )
    starts, ends = ends[:-1], ends[1:]
    offset = n_k - n_q if align == "end" else 0
    first, last = np.maximum(starts - offset, 0), np.minimum(ends - offset, n_q)
    windows = Windows(first, starts, last - first, ends - starts, first + offset - starts)
    return windows.take(np.flatnonzero(last > first))


def _abridged(numbers: Int64) -> str:
    shown = [str(n) for n in numbers.tolist()]
    return f"[{', '.join(shown if len(shown) <= 6 else [*shown[:3], '…', *shown[-2:]])}]"


def _check_contiguous(ids: NDArray[Any], starts: NDArray[np.int64]) -> None:
    distinct, first = np.unique(ids, return_index=True)
    if len(distinct) == len(ids):
        return
    repeated = int(np.setdiff1d(np.arange(len(ids)), first)[0])
    raise DocumentsNotContiguousError(int(starts[repeated]), int(ids[repeated]))
