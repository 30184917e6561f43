"""A relation as a loop-free expression over a batch entry, a head, a row, a key and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.block_conditions import decide
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.ir import (
    VALUES,
    Const,
    DataRead,
    Element,
    Extent,
    HeadIndex,
    Index,
    Lookup,
    Pattern,
    Position,
    Reduce,
    RoundToInt,
    Tensor,
    Truth,
    UnitCondition,
    Value,
    fold,
    intern,
    is_truth,
)
from attnc.compiler.ir.array_evaluator import PointBatch
from attnc.compiler.ir.rewrite import UNROLL, rebuild, rewrite, walk
from attnc.compiler.ir.value_nodes import element
from attnc.compiler.ir.verify_ir import checked, verified
from attnc.compiler.lowering.float_tables import arguments
from attnc.compiler.lowering.specialise import reads_batch, reads_head, specialise
from attnc.compiler.planning.build_plan import CallShape, Relations, conditions
from attnc.compiler.planning.documents import whole
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

Table = NDArray[Any]
Int64 = NDArray[np.int64]


class NotPointwiseError(Exception):
    """Raised where a relation has no loop-free expression. The message names the part that has none."""


@dataclass(frozen=True)
class Pointwise:
    """A condition or number over `head`, `batch`, the row q and the key k, and the tables that it reads.

    The expression has no aggregate, no rounding and no size. Every number in it fits in 64 bits.
    """

    condition: Index
    tables: Mapping[str, Table]


def pointwise(pattern: Pattern, shape: CallShape) -> Pointwise:
    """Return the pointwise relation of a call of a pattern without `documents`.

    Aggregates that depend on one of q and k, rounding and rounded numbers become tables, with O(rows + keys + pairs of
    blocks) entries. Raises NotPointwiseError.
    """
    return _pointwise(pattern, shape, pattern.attend.visible, {})


def pointwise_value(
    pattern: Pattern, shape: CallShape, value: Value, lengths: Mapping[str, tuple[int, ...]]
) -> Pointwise:
    """Return a number as a pointwise value; its reads of vectors and sums over keys are left for the caller to refuse.

    `lengths`: the shapes of the floating inputs. Raises NotPointwiseError.
    """
    return _pointwise(pattern, shape, cast("Index", value), lengths)


def _pointwise(pattern: Pattern, shape: CallShape, root: Index, lengths: Mapping[str, tuple[int, ...]]) -> Pointwise:
    maker = _LoopTables(pattern, shape)
    loop_free = maker.of(_sized(root, shape))
    pattern_with_tables = checked(replace(pattern, tensors=(*pattern.tensors, *maker.tensors)))
    call = replace(shape, inputs={**shape.inputs, **maker.arrays})
    for part in _exact_parts(loop_free):
        if not all(
            fits_word(condition, (0, shape.n_q), (0, shape.n_k))
            for condition in conditions(pattern_with_tables, call, part)
        ):
            raise NotPointwiseError("numbers that may not fit in 64 bits")
    by_row = _by_row(loop_free, pattern, call, {name: array.shape for name, array in call.inputs.items()} | {**lengths})
    names_read = {node.tensor.name for node in walk(by_row) if isinstance(node, Lookup)}
    return Pointwise(by_row, {name: array for name, array in call.inputs.items() if name in names_read})


def _exact_parts(root: Index) -> list[Index]:
    """Return the largest exact expressions in a condition or a number."""
    if not isinstance(root, VALUES):
        return [root]
    children = (child for node in root.below if isinstance(node, VALUES) for child in node.children())
    return list(dict.fromkeys(child for child in children if not isinstance(child, VALUES)))


def _sized(relation: Index, shape: CallShape) -> Index:
    """Replace all sizes of a relation by their values in the call."""
    sizes = {**shape.sizes, "queries": shape.n_q, "keys": shape.n_k}
    group = fold.const(max(shape.heads // max(shape.kv_heads, 1), 1))

    def change(node: Index) -> Index | None:
        match node:
            case Extent(name=name):
                return fold.const(sizes[name])
            case HeadIndex(name="kv_head"):
                return fold.floordiv(fold.head_index("head"), group)
            case _:
                return None

    return rewrite(relation, change)


@verified
def _by_row(root: Index, pattern: Pattern, shape: CallShape, lengths: Mapping[str, tuple[int, ...]]) -> Index:
    """Rewrite an expression over positions to rows, and reads of unbatched inputs to their only batch entry."""
    shift = fold.const(whole(shape.n_q, shape.n_k, pattern.align).shift)

    def change(node: Index) -> Index | None:
        match node:
            case Position(name="q"):
                return fold.add(node, shift)
            case Lookup(tensor=tensor, indices=indices):
                return fold.lookup(tensor, tuple(map(placed, tensor.dims, lengths[tensor.name], indices)))
            case _ if isinstance(node, Element) and node.tensor.name in lengths:
                input_tensor = node.tensor
                return cast(
                    "Index",
                    element(
                        input_tensor, tuple(map(placed, input_tensor.dims, lengths[input_tensor.name], node.indices))
                    ),
                )
            case _:
                return None

    def placed(dim: str | int, length: int, index: Index) -> Index:
        if dim == "batch" and length == 1:
            return fold.const(0)
        return fold.sub(index, shift) if dim == "query" else index

    return rewrite(root, change)


class _LoopTables:
    """Replaces loops by reads of tables."""

    def __init__(self, pattern: Pattern, shape: CallShape) -> None:
        self._pattern = pattern
        self._shape = shape
        self._relations = Relations(pattern, shape)
        self._done: dict[Index, Index] = {}
        self.tensors: list[Tensor] = []
        self.arrays: dict[str, Table] = {}

    def of(self, node: Index) -> Index:
        """Return a node with its loops replaced."""
        if node not in self._done:
            match node:
                case UnitCondition():
                    self._done[node] = self._rounded(node)
                case Reduce() | RoundToInt():
                    self._done[node] = self._tabled(node)
                case _:
                    self._done[node] = rebuild(node, tuple(map(self.of, node.children())))
        return self._done[node]

    def _tabled(self, node: Reduce | RoundToInt) -> Index:
        places = {below.name for below in walk(node) if isinstance(below, Position)}
        if len(places) < 2:
            return self._by_place(node, "k" if "k" in places else "q")
        if isinstance(node, RoundToInt):
            return self._by_argument(node)
        raise NotPointwiseError(f"`{node.op}` over {UNROLL} terms or more that read the query and the key")

    def _by_place(self, node: Index, place: str) -> Index:
        """Read a node that depends on one of q and k from a table with an entry for each position."""
        rows, keys = ((0, self._shape.n_q), (0, 1)) if place == "q" else ((0, 1), (0, self._shape.n_k))

        def entries(specialised: Index) -> tuple[Table]:
            values = (
                exact_evaluation.mask(specialised, rows, keys)
                if is_truth(node)
                else exact_evaluation.integers(specialised, rows, keys)
            )
            return (values.reshape(-1),)

        dims, kind = ("query" if place == "q" else "key",), "bool" if is_truth(node) else "int"
        (table,) = self._tables(node, entries, [dims], [kind])
        return self._read(table, fold.place("q" if place == "q" else "k"))

    def _by_argument(self, node: RoundToInt) -> Index:
        """Read a rounded number that depends on q and k from a table with an entry for each value of its argument."""
        (argument,) = arguments(node.value)
        if reads_head(node) or reads_batch(self._pattern, node):
            raise NotPointwiseError(
                f"`{node.op}` of a number that depends on the query, the key, and the head or batch entry"
            )
        result = self._specialised(node, 0, 0)
        if isinstance(result, Const):
            return result
        assert isinstance(result, DataRead)
        first = fold.sub(self._specialised(argument, 0, 0), result.indices[0])
        table = self._tensor("int", (len(result.data.array),), result.data.array)
        return fold.lookup(table, (fold.sub(self.of(argument), first),))

    def _rounded(self, node: UnitCondition) -> Index:
        """Read a condition on blocks from tables: the block of each row and key, and the truth of each block pair."""

        def entries(specialised: Index) -> tuple[Table, Table, Table]:
            return _blocks(specialised, self._shape.n_q, self._shape.n_k, self._pattern.origins)

        shapes = [("query",), ("key",), (None, None)]
        rows, keys, kept = self._tables(node, entries, shapes, ["int", "int", "bool"])
        row = self._read(rows, fold.place("q"))
        return self._read(kept, row, self._read(keys, fold.place("k")))

    # --- tables -----------------------------------------------------------------------------------------------------

    def _specialised(self, node: Index, batch: int, head: int) -> Index:
        shape = self._shape
        window = whole(shape.n_q, shape.n_k, self._pattern.align)
        group = max(shape.heads // max(shape.kv_heads, 1), 1)
        relations = self._relations
        return specialise(node, relations.sizes, relations.slices, window, batch=batch, head=head, group=group)

    def _tables(
        self,
        node: Index,
        entries: Callable[[Index], tuple[Table, ...]],
        dims: list[tuple[str | None, ...]],
        kinds: list[str],
    ) -> list[Tensor]:
        """Make the tables of a node, with leading dimensions for the batch entries and heads that it depends on."""
        batches = range(self._shape.batch if reads_batch(self._pattern, node) else 1)
        heads = range(self._shape.heads if reads_head(node) else 1)
        try:
            entries_by_node = {
                specialised: entries(specialised)
                for specialised in {self._specialised(node, b, h) for b in batches for h in heads}
            }
        except EvaluationError as error:
            raise NotPointwiseError("an aggregate with a fault at some position") from error
        made = []
        for number, (table_dims, kind) in enumerate(zip(dims, kinds, strict=True)):
            parts = [[entries_by_node[self._specialised(node, b, h)][number] for h in heads] for b in batches]
            array = _stacked(parts)
            sizes = [size if dim is None else dim for dim, size in zip(table_dims, array.shape[2:], strict=True)]
            lead = ("batch" if len(batches) > 1 else 1, "head" if len(heads) > 1 else 1)
            made.append(self._tensor(kind, (*lead, *sizes), array))
        return made

    def _tensor(self, kind: str, dims: tuple[str | int, ...], array: Table) -> Tensor:
        tensor = intern(Tensor(f"table {len(self.tensors)}", cast("Any", kind), dims))
        self.tensors.append(tensor)
        self.arrays[tensor.name] = array
        return tensor

    def _read(self, table: Tensor, *indices: Index) -> Index:
        """Read an entry of a table for the current batch entry and head."""
        lead = (fold.head_index(dim) if isinstance(dim, str) else fold.const(0) for dim in table.dims[:2])
        return fold.lookup(table, (*lead, *indices))


def _blocks(node: Index, n_q: int, n_k: int, origins: Mapping[Index, Span]) -> tuple[Int64, Int64, NDArray[np.bool_]]:
    """Return the block number of each row and of each key, and whether each pair of blocks is kept."""
    if not isinstance(node, UnitCondition):
        assert isinstance(node, Truth)
        return np.zeros(n_q, dtype=np.int64), np.zeros(n_k, dtype=np.int64), np.full((1, 1), node.value)
    q_units = np.stack([exact_evaluation.integers(unit, (0, n_q), (0, 1))[:, 0] for unit in node.q_units])
    k_units = np.stack([exact_evaluation.integers(unit, (0, 1), (0, n_k))[0] for unit in node.k_units])
    q_blocks, rows = np.unique(q_units, axis=1, return_inverse=True)
    k_blocks, keys = np.unique(k_units, axis=1, return_inverse=True)
    a, b = np.indices((q_blocks.shape[1], k_blocks.shape[1])).reshape(2, -1)
    variables = dict(zip(node.q_vars, q_blocks[:, a], strict=True)) | dict(
        zip(node.k_vars, k_blocks[:, b], strict=True)
    )
    zeros = np.zeros(len(a), dtype=np.int64)
    kept = decide(node.keep, PointBatch(variables, zeros, zeros), origins)
    return rows.reshape(-1), keys.reshape(-1), kept.reshape(q_blocks.shape[1], k_blocks.shape[1])


def _stacked(parts: list[list[Table]]) -> Table:
    """Stack arrays by batch entry and head; smaller arrays are padded with zeros, which are never read."""
    largest = tuple(np.max([part.shape for row in parts for part in row], axis=0))
    stacked = np.zeros((len(parts), len(parts[0]), *largest), dtype=parts[0][0].dtype)
    for b, row in enumerate(parts):
        for h, part in enumerate(row):
            stacked[b, h][tuple(map(slice, part.shape))] = part
    return stacked
