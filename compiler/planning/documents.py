"""Documents: contiguous runs of tokens with one id, each a separate sequence.

A relation that requires equal ids, `ids[q] == ids[k] and …`, is split into one window for each run of an id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.hashing import kinds
from attnc.compiler.analysis.translation import Dependences
from attnc.compiler.ir import Arith, Compare, Const, Data, DataRead, Index, Linear, Position, fold
from attnc.compiler.ir.rewrite import rewrite, walk
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.residues import conjuncts

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
    return _windows_between(starts, np.append(starts[1:], n_k), n_q, n_k, align)


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
    return _windows_between(ends[:-1], ends[1:], n_q, n_k, align)


def _windows_between(starts: Int64, ends: Int64, n_q: int, n_k: int, align: Literal["start", "end"] | None) -> Windows:
    """Return the windows of the keys `starts .. ends` that have queries in this call."""
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


@dataclass(frozen=True, slots=True, eq=False)
class _IdComparison:
    """The comparison `data[q + of_q] == data[k + of_k]`."""

    data: Data
    of_q: int
    of_k: int


def windows_of_ids(relation: Index, n_q: int, n_k: int) -> list[tuple[Windows, Index]] | None:
    """Return the windows of rows and keys with one id of a specialised relation, each with the remaining condition.

    None if the relation requires no equal ids, if an id appears again after another id, or if the remaining condition
    depends on more than the distance between a row and a key, so that windows would differ.
    """
    parts = conjuncts(relation)
    numbered = next(((i, equal) for i, part in enumerate(parts) if (equal := _id_comparison(part, n_q, n_k))), None)
    if numbered is None:
        return None
    number, equal = numbered
    rest = fold.conjunction(*parts[:number], *parts[number + 1 :])
    windows = _depends_on_distance(rest) and _windows(equal, n_q, n_k)
    if not windows:
        return None
    distance = windows.row - windows.key
    return [(windows.take(indices), _moved(rest, int(distance[indices[0]]))) for indices in alike(distance)]


def _id_comparison(part: Index, n_q: int, n_k: int) -> _IdComparison | None:
    """Return a conjunct as a comparison of the ids of query and key, None for any other conjunct."""
    if not (isinstance(part, Compare) and part.op == "eq" and isinstance(part.value, Linear)):
        return None
    terms, constant = part.value.terms, part.value.constant
    if constant or len(terms) != 2 or sorted(factor for _, factor in terms) != [-1, 1]:
        return None
    reads = {}
    for term, _ in terms:
        if not isinstance(term, DataRead) or len(term.indices) != 1:
            return None
        (index,) = term.indices
        summands, shift = fold.parts(index)
        if len(summands) != 1 or not isinstance(summands[0][0], Position) or summands[0][1] != 1:
            return None
        reads[summands[0][0].name] = term.data, shift
    if set(reads) != {"q", "k"} or reads["q"][0] is not reads["k"][0]:
        return None
    data, of_q, of_k = reads["q"][0], reads["q"][1], reads["k"][1]
    inside = min(of_q, of_k) >= 0 and max(of_q + n_q, of_k + n_k) <= len(data.array)
    return _IdComparison(data, of_q, of_k) if inside else None


def _depends_on_distance(condition: Index) -> bool:
    """Whether a condition depends on `q - k` alone and is defined for every distance."""
    growth = Dependences().growth(condition)
    defined = not any(isinstance(node, DataRead) or _divides(node) for node in walk(condition))
    return defined and growth is not None and not growth.by and growth.tokens == 1


def _divides(node: Index) -> bool:
    """Whether a node may be undefined: a division or power by something that is not constant."""
    return isinstance(node, Arith) and node.op in ("floordiv", "mod", "pow") and not isinstance(node.operands[1], Const)


def _windows(equal: _IdComparison, n_q: int, n_k: int) -> Windows | None:
    """Return a window for each id that has rows and keys; None if an id appears again after another id."""
    ids: NDArray[Any] = equal.data.array
    starts = np.append(0, np.flatnonzero(ids[1:] != ids[:-1]) + 1)
    if len(np.unique(ids[starts])) < len(starts):
        return None
    ends = np.append(starts[1:], len(ids))
    row, row_stop = (np.clip(x - equal.of_q, 0, n_q) for x in (starts, ends))
    key, key_stop = (np.clip(x - equal.of_k, 0, n_k) for x in (starts, ends))
    windows = Windows(row, key, row_stop - row, key_stop - key, np.zeros_like(row))
    return windows.take(np.flatnonzero((windows.n_q > 0) & (windows.n_k > 0)))


@verified
def _moved(condition: Index, rows: int) -> Index:
    """Return the relation of windows whose first row is `rows` tokens after their first key."""
    if not rows:
        return condition
    return rewrite(
        condition,
        lambda node: fold.add(node, fold.const(rows)) if isinstance(node, Position) and node.name == "q" else None,
    )
