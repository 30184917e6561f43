"""Relations that select blocks of keys: the truth tensor of the selection, and the condition besides it."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.heads import at_own_head
from attnc.compiler.analysis.intervals import Boxes, classify
from attnc.compiler.ir import Compare, HeadIndex, Index, Lookup, Tensor, Truth, fold
from attnc.compiler.ir.value_nodes import reads
from attnc.compiler.planning.formulas import diagonal_shift
from attnc.compiler.planning.residues import conjuncts

Int64 = NDArray[np.int64]

ROWS = 64
"""Number of rows of a tile whose visibility is analysed at once."""

FILLED = 32
"""Gathered rows are padded to a multiple of this number on a CPU.

Rows that do not fill a tile, or a vector register, are computed in another way.
"""


def parts_of(lanes: int, rows: int, threads: int) -> int:
    """Return the number of parts into which `rows` rows of each of `lanes` heads are cut.

    With it every thread gets equally many parts. 1 for few rows.
    """
    parts = threads // gcd(lanes, threads)
    return parts if rows > FILLED * parts else 1


@dataclass(frozen=True)
class SelectedKeys:
    """A relation that holds where the key's block is selected by the query's row and `rest` holds.

    `chosen`: the truth tensor of the selection, by row and block; None: row i sees block i. `row_of`: the row of a
    query. `item_of`: the block of a key.
    """

    chosen: Tensor | None
    row_of: Index
    item_of: Index
    rest: Index

    @property
    def by_batch(self) -> bool:
        """Whether each batch entry has its own selection."""
        return "batch" in self._dims

    @property
    def by_heads(self) -> bool:
        """Whether each query head or each kv head has its own selection."""
        return bool({"head", "kv_head"} & self._dims)

    @property
    def by_head(self) -> bool:
        """Whether each query head has its own selection."""
        return "head" in self._dims

    @property
    def by_data(self) -> bool:
        """Whether the row of a query or the block of a key depends on inputs."""
        return any(isinstance(below, Lookup) for root in (self.row_of, self.item_of) for below in root.below)

    @property
    def is_by_query(self) -> bool:
        """Whether each query is a row of its own."""
        return self.chosen is not None and self.chosen.dims[-2] == "query" and self.row_of is fold.place("q")

    @property
    def _dims(self) -> set[str | int]:
        """The dimensions of the selection's tensor and of the inputs that give rows and blocks."""
        read = [
            below.tensor for root in (self.row_of, self.item_of) for below in root.below if isinstance(below, Lookup)
        ]
        return {dim for tensor in (*read, *([] if self.chosen is None else [self.chosen])) for dim in tensor.dims}


def chosen_keys(visible: Index) -> SelectedKeys | None:
    """Return the relation as a selection of blocks, None if it is none or the rest depends on more than positions."""
    selected = single_keys(visible)
    return None if selected is None or selected.item_of is fold.place("k") else selected


def single_keys(visible: Index) -> SelectedKeys | None:
    """Return the relation as a selection of blocks or of single keys, None if it is not one."""
    parts = conjuncts(visible)
    lookups = [part for part in parts if isinstance(part, Lookup) and part.tensor.kind == "bool"]
    if not lookups:
        return _same_block(parts)
    if len(lookups) != 1 or len(lookups[0].indices) < 2:
        return None
    (lookup,) = lookups
    supported_dims = ((), ("batch",), ("head",), ("kv_head",), ("batch", "head"), ("batch", "kv_head"))
    if lookup.tensor.dims[:-2] not in supported_dims or not at_own_head(lookup, len(lookup.indices) - 2):
        return None
    row_of, item_of = lookup.indices[-2:]
    if not ((_depends_on_only(row_of, "q") or not reads(row_of)) and _depends_on_only(item_of, "k")):
        return None
    rest = fold.conjunction(*(part for part in parts if part is not lookup))
    if any(isinstance(node, Lookup | HeadIndex) for node in rest.below):
        return None
    return SelectedKeys(lookup.tensor, row_of, item_of, rest)


def _same_block(parts: tuple[Index, ...]) -> SelectedKeys | None:
    """Return the blocks of tokens that share a number after sorting: `order(h)[q] // 64 == order(h)[k] // 64`."""
    for part in parts:
        if not (isinstance(part, Compare) and part.op == "eq"):
            continue
        terms, constant = fold.parts(part.value)
        sign = -1 if any(n < 0 for term, n in terms if "k" not in reads(term)) else 1
        query_number = fold.linear([(term, sign * n) for term, n in terms if "k" not in reads(term)], sign * constant)
        key_number = fold.linear([(term, -sign * n) for term, n in terms if "k" in reads(term)], 0)
        is_sorted = any(isinstance(below, Lookup) and below.tensor.made is not None for below in part.below)
        rest = fold.conjunction(*(other_part for other_part in parts if other_part is not part))
        only_positions = not any(isinstance(node, Lookup | HeadIndex) for node in rest.below)
        if is_sorted and only_positions and _depends_on_only(query_number, "q") and _depends_on_only(key_number, "k"):
            return SelectedKeys(None, query_number, key_number, rest)
    return None


def _depends_on_only(node: Index, position: str) -> bool:
    """Whether an expression depends on one position only, or on inputs at that position, batch entry and head."""
    has_inputs = any(isinstance(below, Lookup) for below in node.below)
    allowed = {"head", "batch"} if has_inputs else set()
    return reads(node) - allowed == {position}


@dataclass(frozen=True, eq=False)
class BlockKeys:
    """The keys of each block of a call, and their visibility besides the selection.

    Block i has the keys `starts[i] .. starts[i + 1]`, as indices into `order`, or as keys if `order` is None.
    `row_of`: the row of each query, None if each query is a row. `rest`: the specialised condition besides the
    selection. `states` (tiles of `ROWS` rows, blocks): 1 if `rest` holds for all rows and keys, -1 if for none, else 0;
    None if it holds everywhere. `diagonal`: the c if `rest` is `k <= q + c`, else None.
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
    """Return the blocks of a call from specialised expressions over its queries and keys.

    `count`: the number of rows. `items`: the number of blocks. None if a query or key lies outside of all of them.
    """
    ids = _numbers(item_of, 1, n_k)[0]
    if len(ids) and not (ids.min() >= 0 and ids.max() < items):
        return None
    order = None if (ids[1:] >= ids[:-1]).all() else np.argsort(ids, kind="stable")
    sorted_ids = ids if order is None else ids[order]
    starts = np.searchsorted(sorted_ids, np.arange(items + 1))
    rows = None if row_of is None else _numbers(row_of, n_q, 1)[:, 0]
    if rows is not None and len(rows) and not (rows.min() >= 0 and rows.max() < count):
        return None
    states = None
    if not (isinstance(rest, Truth) and rest.value):
        states = _states(rest, n_q, starts, order)
    return BlockKeys(starts, order, rows, states, rest, diagonal_shift(rest))


def find_same_places(row_of: Index, item_of: Index, rest: Index, n_q: int, n_k: int) -> BlockKeys:
    """Return the blocks of tokens that share a number; queries whose number no key has get an empty last block."""
    numbers, items = np.unique(_numbers(item_of, 1, n_k)[0], return_inverse=True)
    order = np.argsort(items, kind="stable")
    starts = np.searchsorted(items[order], np.arange(len(numbers) + 2))
    query_numbers = _numbers(row_of, n_q, 1)[:, 0]
    rows = np.searchsorted(numbers, query_numbers)
    padded_numbers = np.append(numbers, 0)
    rows = np.where((rows < len(numbers)) & (padded_numbers[rows] == query_numbers), rows, len(numbers))
    states = None if isinstance(rest, Truth) and rest.value else _states(rest, n_q, starts, order)
    return BlockKeys(starts, order, rows, states, rest, None)


def _numbers(node: Index, n_q: int, n_k: int) -> Int64:
    """Return the values of an expression at all queries and keys: (n_q, n_k)."""
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
    state = classify(rest, boxes)
    return np.array(np.broadcast_to(state, (len(first), len(low))), dtype=np.int8)
