"""Documents as part of the relation: a pattern with `documents` becomes one without, over all tokens of the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.ir import Extent, Index, Lookup, Pattern, Position, Tensor, UnitCondition, fold, intern
from attnc.compiler.ir.rewrite import rewrite, walk
from attnc.compiler.ir.verify_ir import checked
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.planning.build_plan import CallShape, Relations

Int64 = NDArray[np.int64]


class RoundedDocumentsError(Exception):
    """Raised for rounded relations, because blocks of documents are not blocks of the whole sequence."""


def join_documents(pattern: Pattern, shape: CallShape) -> tuple[Pattern, CallShape]:
    """Turn the documents of a pattern and a call into a relation over all tokens; without documents, change nothing.

    A pair is visible where both tokens are in the same document and the relation holds for their positions within the
    document. Documents and positions are read from tables, which become inputs of the new pattern. Raises
    RoundedDocumentsError, and the errors of `Relations` for invalid documents.
    """
    if pattern.documents is None:
        return pattern, shape
    relation = pattern.attend.visible
    if any(isinstance(node, UnitCondition) for node in walk(relation)):
        raise RoundedDocumentsError
    relations = Relations(pattern, shape)
    batched = "batch" in pattern.documents.dims
    batches = range(len(shape.inputs[pattern.documents.name])) if batched else range(1)
    windows = [tuple(relations.windows(batch)) for batch in batches]
    tables = _Tables(batched)
    joined = fold.conjunction(
        fold.equal(tables.read("document", "query"), tables.read("document", "key")), _over_call(relation, tables)
    )
    arrays = tables.arrays(windows, shape.n_q, shape.n_k)
    node = replace(pattern.attend, visible=joined)
    joined_pattern = replace(pattern, documents=None, tensors=(*pattern.tensors, *tables.tensors), nodes=(node,))
    return checked(joined_pattern), replace(shape, inputs={**shape.inputs, **arrays})


class _Tables:
    """The tables of each token's document, by query and by key."""

    def __init__(self, batched: bool) -> None:
        self._lead = ("batch",) if batched else ()
        self._known: dict[tuple[str, str], Tensor] = {}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self._known.values())

    def read(self, quantity: str, dim: str) -> Index:
        """Return the entry of a table for the current query or key."""
        if (quantity, dim) not in self._known:
            self._known[quantity, dim] = intern(Tensor(f"{quantity} by {dim}", "int", (*self._lead, dim)))
        lead = (fold.head_index("batch"),) if self._lead else ()
        return fold.lookup(self._known[quantity, dim], (*lead, fold.place("q" if dim == "query" else "k")))

    def arrays(self, windows: Sequence[Sequence[Window]], n_q: int, n_k: int) -> dict[str, Int64]:
        """Return the entries of all tables; a token outside of all documents equals no other token."""
        result = {}
        for (quantity, dim), tensor in self._known.items():
            rows = np.stack(
                [
                    _entries(windows_of_entry, quantity, dim, n_q if dim == "query" else n_k)
                    for windows_of_entry in windows
                ]
            )
            result[tensor.name] = rows if self._lead else rows[0]
        return result


def _entries(windows: Sequence[Window], quantity: str, dim: str, length: int) -> Int64:
    entries = np.full(length, -1 if dim == "query" else -2, dtype=np.int64)
    for number, window in enumerate(windows):
        first, count = (window.row, window.n_q) if dim == "query" else (window.key, window.n_k)
        values = {"document": number, "start": window.key, "queries": window.n_q, "keys": window.n_k}
        entries[first : first + count] = values[quantity]
    return entries


def _over_call(relation: Index, tables: _Tables) -> Index:
    """Rewrite a relation over positions in a document to positions in the call; a document starts at its first key."""
    start = tables.read("start", "query")
    local_k = fold.sub(fold.place("k"), tables.read("start", "key"))

    def change(node: Index) -> Index | None:
        match node:
            case Position(name="q"):
                return fold.sub(node, start)
            case Position(name="k"):
                return local_k
            case Extent(name="queries" | "keys" as name):
                return tables.read(name, "query")
            case Lookup(tensor=tensor, indices=indices):
                return fold.lookup(tensor, tuple(map(placed, tensor.dims, indices)))
            case _:
                return None

    def placed(dim: str | int, index: Index) -> Index:
        if dim not in ("token", "key", "query"):
            return index
        return fold.place("k") if index is local_k else fold.add(index, start)

    return rewrite(relation, change)
