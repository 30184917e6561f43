"""Attention to chosen keys: which of it is a choice among places of consecutive keys, and what else must hold."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import Boxes, classify
from attnc.compiler.heads import at_own_head
from attnc.compiler.ir import Bool, Compare, HeadIndex, Index, Lookup, Tensor, Truth
from attnc.compiler.planning.formulas import diagonal_shift
from attnc.compiler.value_nodes import reads

Int64 = NDArray[np.int64]

ROWS = 64
"""Rows that are looked at together."""

FILLED = 32
"""On a CPU gathered rows are filled up to a multiple of this: what is left over of a tile, or of a vector of the
processor, is computed in another way.
"""


def parts_of(lanes: int, rows: int, threads: int) -> int:
    """Parts of so many rows that a call of `lanes` heads is cut into, threads having as many each; 1 for few."""
    parts = threads // gcd(lanes, threads)
    return parts if rows > FILLED * parts else 1


@dataclass(frozen=True)
class SelectedKeys:
    """A relation that is `rest` for the keys in the places that a row chose, as a truth tensor `chosen` tells.

    `row_of`: the row that the query is in; `item_of`: the place that the key is in. Without `chosen` a row sees the
    place of its own number.
    """

    chosen: Tensor | None
    row_of: Index
    item_of: Index
    rest: Index

    @property
    def by_batch(self) -> bool:
        """Whether batch entries choose by themselves."""
        return "batch" in self._dims

    @property
    def by_heads(self) -> bool:
        """Whether heads, or those of a kv head, do."""
        return bool({"head", "kv_head"} & self._dims)

    @property
    def by_head(self) -> bool:
        """Whether each query head does."""
        return "head" in self._dims

    @property
    def by_data(self) -> bool:
        """Whether inputs tell who is where."""
        return any(isinstance(below, Lookup) for root in (self.row_of, self.item_of) for below in root.below)

    @property
    def is_by_query(self) -> bool:
        """Whether each query is a row."""
        return self.chosen is not None and self.chosen.dims[-2] == "query" and self.row_of is fold.place("q")

    @property
    def _dims(self) -> set[str | int]:
        """The dimensions of what is read."""
        read = [
            below.tensor for root in (self.row_of, self.item_of) for below in root.below if isinstance(below, Lookup)
        ]
        return {dim for tensor in (*read, *([] if self.chosen is None else [self.chosen])) for dim in tensor.dims}


def chosen_keys(visible: Index) -> SelectedKeys | None:
    """The relation as a choice among places of keys, where it is one and all else in it depends on positions alone."""
    selected = single_keys(visible)
    return None if selected is None or selected.item_of is fold.place("k") else selected


def single_keys(visible: Index) -> SelectedKeys | None:
    """Return the selected keys of a relation whose blocks may be single keys, else None."""
    parts = visible.operands if isinstance(visible, Bool) and visible.op == "and" else (visible,)
    lookups = [part for part in parts if isinstance(part, Lookup) and part.tensor.kind == "bool"]
    if not lookups:
        return _same_place(parts)
    if len(lookups) != 1 or len(lookups[0].indices) < 2:
        return None
    (lookup,) = lookups
    known = ((), ("batch",), ("head",), ("kv_head",), ("batch", "head"), ("batch", "kv_head"))
    if lookup.tensor.dims[:-2] not in known or not at_own_head(lookup, len(lookup.indices) - 2):
        return None
    row_of, item_of = lookup.indices[-2:]
    if not ((_is_of(row_of, "q") or not reads(row_of)) and _is_of(item_of, "k")):
        return None
    rest = fold.conjunction(*(part for part in parts if part is not lookup))
    if any(isinstance(node, Lookup | HeadIndex) for node in rest.below):
        return None
    return SelectedKeys(lookup.tensor, row_of, item_of, rest)


def _same_place(parts: tuple[Index, ...]) -> SelectedKeys | None:
    """Tokens that sorting puts into one place: `order(h)[q] // 64 == order(h)[k] // 64`."""
    for part in parts:
        if not (isinstance(part, Compare) and part.op == "eq"):
            continue
        terms, constant = fold.parts(part.value)
        sign = -1 if any(n < 0 for term, n in terms if "k" not in reads(term)) else 1
        own = fold.linear([(term, sign * n) for term, n in terms if "k" not in reads(term)], sign * constant)
        other = fold.linear([(term, -sign * n) for term, n in terms if "k" in reads(term)], 0)
        sorted_ = any(isinstance(below, Lookup) and below.tensor.made is not None for below in part.below)
        rest = fold.conjunction(*(each for each in parts if each is not part))
        of_positions = not any(isinstance(node, Lookup | HeadIndex) for node in rest.below)
        if sorted_ and of_positions and _is_of(own, "q") and _is_of(other, "k"):
            return SelectedKeys(None, own, other, rest)
    return None


def _is_of(node: Index, place: str) -> bool:
    """Whether a number is of the token at a place; inputs may tell it, at the batch entry and head at hand."""
    has_inputs = any(isinstance(below, Lookup) for below in node.below)
    besides = {"head", "batch"} if has_inputs else set()
    return reads(node) - besides == {place}


@dataclass(frozen=True, eq=False)
class BlockKeys:
    """The keys of each place: those from `starts[i]` to `starts[i + 1]`, in their `order` where that is not theirs.

    `row_of`: the row that each query is in, None where each is one. `states` (rows in tiles of `ROWS`, places): 1 where
    all keys of a place are visible to all of those rows if they are chosen, -1 where none is, 0 where that differs;
    None where everything is visible. `rest`, specialised, is what decides; `diagonal`: the c of `k <= q + c`, if it is
    that.
    """

    starts: Int64
    order: Int64 | None
    row_of: Int64 | None
    states: NDArray[np.int8] | None
    rest: Index
    diagonal: int | None


def find_places(
    row_of: Index | None, item_of: Index, rest: Index, n_q: int, n_k: int, count: int, items: int
) -> BlockKeys | None:
    """The places of a call, from specialised expressions over its rows and keys: `count` rows and `items` places.

    None where some query or key is in none of them.
    """
    ids = _numbers(item_of, 1, n_k)[0]
    if len(ids) and not (ids.min() >= 0 and ids.max() < items):
        return None
    order = None if (ids[1:] >= ids[:-1]).all() else np.argsort(ids, kind="stable")
    own = ids if order is None else ids[order]
    starts = np.searchsorted(own, np.arange(items + 1))
    rows = None if row_of is None else _numbers(row_of, n_q, 1)[:, 0]
    if rows is not None and len(rows) and not (rows.min() >= 0 and rows.max() < count):
        return None
    states = None
    if not (isinstance(rest, Truth) and rest.value):
        states = _states(rest, n_q, starts, order)
    return BlockKeys(starts, order, rows, states, rest, diagonal_shift(rest))


def find_same_places(row_of: Index, item_of: Index, rest: Index, n_q: int, n_k: int) -> BlockKeys:
    """The places of tokens that share a number; the last one, without keys, is for queries whose number no key has."""
    numbers, items = np.unique(_numbers(item_of, 1, n_k)[0], return_inverse=True)
    order = np.argsort(items, kind="stable")
    starts = np.searchsorted(items[order], np.arange(len(numbers) + 2))
    own = _numbers(row_of, n_q, 1)[:, 0]
    rows = np.searchsorted(numbers, own)
    known = np.append(numbers, 0)
    rows = np.where((rows < len(numbers)) & (known[rows] == own), rows, len(numbers))
    states = None if isinstance(rest, Truth) and rest.value else _states(rest, n_q, starts, order)
    return BlockKeys(starts, order, rows, states, rest, None)


def _numbers(node: Index, n_q: int, n_k: int) -> Int64:
    if not (n_q and n_k):
        return np.zeros((n_q, n_k), dtype=np.int64)
    return np.array(np.broadcast_to(exact_evaluation.integers(node, (0, n_q), (0, n_k)), (n_q, n_k)))


def _states(rest: Index, n_q: int, starts: Int64, order: Int64 | None) -> NDArray[np.int8]:
    """Return the state of every tile of rows and every block, by the rectangle around the block's keys."""
    first = np.arange(0, n_q, ROWS)
    last = np.minimum(first + ROWS, n_q) - 1
    low, high = starts[:-1], np.maximum(starts[1:] - 1, starts[:-1])
    if order is not None and len(order):
        filled = starts[1:] > starts[:-1]
        ends = np.zeros((2, len(filled)), dtype=np.int64)
        ends[0, filled] = np.minimum.reduceat(order, low[filled])
        ends[1, filled] = np.maximum.reduceat(order, low[filled])
        low, high = ends
    boxes = Boxes(first[:, None], last[:, None], low[None, :], high[None, :])
    found = classify(rest, boxes, keyed=False).state
    return np.array(np.broadcast_to(found, (len(first), len(low))), dtype=np.int8)
