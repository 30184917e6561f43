"""Specialising a relation to one call: sizes become constants, inputs become data, positions become rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.ir import Data, Extent, HeadIndex, Index, Lookup, Pattern, Position, RoundToInt, Tensor, Var
from attnc.compiler.lowering.float_tables import tabulated
from attnc.compiler.rewrite import rewrite, walk
from attnc.compiler.verify_ir import verified


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of tokens that is treated as a sequence of its own: a document, or all of them.

    Its queries are rows `row .. row + n_q` of the call, its keys `key .. key + n_k`; the query of local row r stands at
    local position `r + shift`.
    """

    row: int
    key: int
    n_q: int
    n_k: int
    shift: int


@dataclass(frozen=True)
class CallSizes:
    """Every size of a call by name (`heads`, `kv_heads`, `group`, `dk`, `dv`, new dimensions, segment lengths)."""

    values: Mapping[str, int]


class Slices:
    """The inputs of one call, cut for a batch entry; equal cuts are one `Data`, so that relations compare.

    A window of `n_k` keys has all tokens, of which keys may be no part.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], n_k: int | None = None) -> None:
        self.tensors = tensors
        self._n_k = n_k
        self._cuts: dict[tuple[object, ...], Data] = {}

    def settle(self) -> None:
        """Forget what analysis has derived from the cuts: many times their size, and quickly made anew."""
        for data in self._cuts.values():
            data.cache.clear()

    def cut(self, tensor: Tensor, batch: int | None, window: Window) -> Data:
        """The tensor without its batch dimension, and with the window's tokens only; None keeps all batch entries."""
        at: list[int | slice] = []
        for dim in tensor.dims:
            match dim:
                case "batch":
                    at.append(slice(None) if batch is None else batch)
                case "token" | "key" if window.key or window.n_k != self._n_k:
                    at.append(slice(window.key, window.key + window.n_k))
                case "query":
                    at.append(slice(window.row, window.row + window.n_q))
                case _:
                    at.append(slice(None))
        key = (tensor, *((a.start, a.stop) if isinstance(a, slice) else a for a in at))
        if key not in self._cuts:
            array = self.tensors[tensor.name]
            at_batch = [
                0 if d == "batch" and n == 1 and isinstance(a, int) else a
                for a, d, n in zip(at, tensor.dims, array.shape, strict=True)
            ]
            self._cuts[key] = Data(tensor.name, np.asarray(array[tuple(at_batch)], order="C"))
        return self._cuts[key]


@verified
def specialise(
    relation: Index, sizes: CallSizes, slices: Slices, window: Window, *, batch: int | Var, head: int | Var, group: int
) -> Index:
    """The relation of one batch entry, head and window, over local rows (place q) and local keys (place k).

    The head and the batch entry may be variables.
    """
    local = {"queries": window.n_q, "keys": window.n_k}
    own = fold.const(head) if isinstance(head, int) else head
    entry = fold.const(batch) if isinstance(batch, int) else batch
    indices = {"head": own, "kv_head": fold.floordiv(own, fold.const(group)), "batch": entry}

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


def alone(relation: Index, n: int, head: int = 0, heads: int = 1, group: int = 1) -> Index:
    """The relation of one of some heads among n tokens, `group` heads to a kv head, for a pattern without inputs.

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
    """The sizes that a relation reads beside lengths and numbers of heads."""
    read = {node.name for node in walk(relation) if isinstance(node, Extent)}
    return sorted(read - {"heads", "kv_heads", "group", "queries", "keys"})


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
    own = any(isinstance(n, HeadIndex) and n.name == "batch" for n in walk(relation))
    inputs = any(isinstance(n, Lookup) and "batch" in n.tensor.dims for n in walk(relation))
    return own or inputs or (pattern.documents is not None and "batch" in pattern.documents.dims)
