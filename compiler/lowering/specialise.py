"""Specialisation of a relation to one call: sizes become constants, inputs become data, positions become rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.ir import Data, Extent, HeadIndex, Index, Lookup, Pattern, Position, RoundToInt, Tensor, Var, fold
from attnc.compiler.ir.rewrite import rewrite, walk
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.lowering.float_tables import tabulated


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of tokens that is treated as a sequence of its own: a document, or all tokens of a call.

    The window's queries are rows `row .. row + n_q` of the call, its keys are `key .. key + n_k`, and the query in
    local row r has local position `r + shift`.
    """

    row: int
    key: int
    n_q: int
    n_k: int
    shift: int


@dataclass(frozen=True)
class CallSizes:
    """Every size of a call by name (`heads`, `kv_heads`, `group`, `dk`, `dv`, declared dimensions, segment lengths)."""

    values: Mapping[str, int]


class Slices:
    """The inputs of one call, cut to batch entries and windows; equal cuts are one `Data`, so relations compare equal.

    A window of `n_k` keys that starts at key 0 holds all tokens, and needs no cut along tokens or keys. `open_`: names
    of bool tensors that each evaluation is given anew, of which only the shapes are known here.
    """

    def __init__(
        self, tensors: Mapping[str, NDArray[Any]], n_k: int | None = None, open_: frozenset[str] = frozenset()
    ) -> None:
        self.tensors = tensors
        self._n_k = n_k
        self._open = open_
        self._cuts: dict[tuple[object, ...], Data] = {}

    def settle(self) -> None:
        """Drop what analysis has cached on the cuts: it takes many times their size, and is quick to compute again."""
        for data in self._cuts.values():
            data.cache.clear()

    def cut(self, tensor: Tensor, batch: int | None, window: Window) -> Data:
        """Return the tensor cut to a batch entry and to the window's tokens; `batch` None keeps all batch entries."""
        cuts: list[int | slice] = []
        for dim in tensor.dims:
            match dim:
                case "batch":
                    cuts.append(slice(None) if batch is None else batch)
                case "token" | "key" if window.key or window.n_k != self._n_k:
                    cuts.append(slice(window.key, window.key + window.n_k))
                case "query":
                    cuts.append(slice(window.row, window.row + window.n_q))
                case _:
                    cuts.append(slice(None))
        key = (tensor, *((a.start, a.stop) if isinstance(a, slice) else a for a in cuts))
        if key not in self._cuts:
            array = self.tensors[tensor.name]
            indices = tuple(
                0 if d == "batch" and n == 1 and isinstance(a, int) else a
                for a, d, n in zip(cuts, tensor.dims, array.shape, strict=True)
            )
            if tensor.name in self._open:
                self._cuts[key] = Data(tensor.name, array[indices], cut=indices)
            else:
                self._cuts[key] = Data(tensor.name, np.asarray(array[indices], order="C"))
        return self._cuts[key]


@verified
def specialise(
    relation: Index, sizes: CallSizes, slices: Slices, window: Window, *, batch: int | Var, head: int | Var, group: int
) -> Index:
    """Return the relation of one batch entry, head and window: q is the local row, k the local key.

    The head and the batch entry may be variables.
    """
    local = {"queries": window.n_q, "keys": window.n_k}
    indices = _head_indices(batch, head, group)

    def change(node: Index) -> Index | None:
        match node:
            case Extent():
                return fold.const(local[node.name] if node.name in local else sizes.values[node.name])
            case HeadIndex():
                return indices[node.name]
            case Position(name="q"):
                return fold.add(node, fold.const(window.shift))
            case Lookup():
                return _read(node, slices, window, batch)
            case RoundToInt():
                return tabulated(node, window.n_q, window.n_k)
            case _:
                return None

    return rewrite(relation, change)


@verified
def of_any_window(
    relation: Index,
    extents: Mapping[str, Index],
    *,
    shift: Index,
    batch: int | Var,
    head: int | Var,
    group: int,
) -> Index:
    """Return a relation that reads no inputs as `specialise` does, for windows of any size; sizes may be variables."""
    indices = _head_indices(batch, head, group)

    def change(node: Index) -> Index | None:
        match node:
            case Extent():
                return extents[node.name]
            case HeadIndex():
                return indices[node.name]
            case Position(name="q"):
                return fold.add(node, shift)
            case _:
                return None

    return rewrite(relation, change)


def _head_indices(batch: int | Var, head: int | Var, group: int) -> dict[str, Index]:
    """Return the index of the head, of its kv head and of the batch entry."""
    head_index = fold.const(head) if isinstance(head, int) else head
    entry = fold.const(batch) if isinstance(batch, int) else batch
    return {"head": head_index, "kv_head": fold.floordiv(head_index, fold.const(group)), "batch": entry}


def alone(relation: Index, n: int, head: int = 0, heads: int = 1, group: int = 1) -> Index:
    """Return the relation of one of `heads` heads over n tokens, `group` heads to a kv head; it may read no inputs.

    Raises KeyError where it reads other sizes (`other_sizes`).
    """
    sizes = CallSizes({"heads": heads, "kv_heads": heads // group, "group": group, "queries": n, "keys": n})
    return specialise(relation, sizes, Slices({}), Window(0, 0, n, n, 0), batch=0, head=head, group=group)


@verified
def of_any_length(relation: Index, head: int = 0, heads: int = 1, group: int = 1) -> Index:
    """Return the relation for any number of tokens; the size `keys` is the only size that it reads.

    Raises KeyError where it reads other sizes (`other_sizes`).
    """
    tokens = fold.extent("keys")
    sizes = {"heads": heads, "kv_heads": heads // group, "group": group}

    def change(node: Index) -> Index | None:
        match node:
            case Extent(name="queries" | "keys"):
                return tokens
            case Extent():
                return fold.const(sizes[node.name])
            case HeadIndex():
                return fold.const({"head": head, "kv_head": head // group, "batch": 0}[node.name])
            case _:
                return None

    return rewrite(relation, change)


def other_sizes(relation: Index) -> list[str]:
    """The names of the sizes that a relation reads besides lengths and numbers of heads."""
    sizes = {node.name for node in walk(relation) if isinstance(node, Extent)}
    return sorted(sizes - {"heads", "kv_heads", "group", "queries", "keys"})


def _read(node: Lookup, slices: Slices, window: Window, batch: int | Var) -> Index:
    data = slices.cut(node.tensor, batch if isinstance(batch, int) else None, window)
    indices = []
    for dim, index in zip(node.tensor.dims, node.indices, strict=True):
        if dim != "batch":
            indices.append(fold.sub(index, fold.const(window.shift)) if dim == "query" else index)
        elif not isinstance(batch, int):
            indices.append(batch if data.array.shape[len(indices)] > 1 else fold.const(0))
    return fold.data_read(data, tuple(indices))


def reads_head(relation: Index) -> bool:
    """Whether the relation depends on the head."""
    return any(isinstance(n, HeadIndex) and n.name in ("head", "kv_head") for n in walk(relation))


def reads_batch(pattern: Pattern, relation: Index) -> bool:
    """Whether the relation depends on the batch entry."""
    by_entry = any(isinstance(n, HeadIndex) and n.name == "batch" for n in walk(relation))
    by_input = any(isinstance(n, Lookup) and "batch" in n.tensor.dims for n in walk(relation))
    return by_entry or by_input or (pattern.documents is not None and "batch" in pattern.documents.dims)
