"""The tiles of a call that may be seen whatever is chosen, and what decides: questions to truth tensors.

All of it is told by the sizes of a call. What is chosen answers the questions, on the device (`runtime.gpu`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import fold
from attnc.compiler.analysis.box_values import FALSE, TRUE, UNKNOWN
from attnc.compiler.analysis.intervals import Boxes, bounds
from attnc.compiler.analysis.questions import (
    Asking,
    JoinedQuestion,
    KnownAnswer,
    Question,
    is_bare,
    joined,
    possible,
    reads_data,
)
from attnc.compiler.ir import (
    Bool,
    ExactSelect,
    Extent,
    HeadIndex,
    Index,
    Lookup,
    Not,
    Pattern,
    Position,
    RoundToInt,
    Tensor,
    intern,
)
from attnc.compiler.kernels.content_masks import MaskRelation, stretch_of
from attnc.compiler.kernels.inputs import LANES
from attnc.compiler.lowering.float_tables import tabulated
from attnc.compiler.planning.build_plan import CallShape
from attnc.compiler.planning.documents import whole
from attnc.compiler.rewrite import rewrite, walk
from attnc.compiler.verify_ir import checked

Int64 = NDArray[np.int64]

MOST_TILES = 1 << 24
"""Tiles of a matrix at most, which are all looked at once for the sizes of a call."""

AT_ONCE = 1 << 18
"""Maximum number of tiles that are analysed at a time."""


@dataclass(frozen=True, eq=False)
class TileQuestions:
    """Tiles that may be seen, row by row: those of row r are from `starts[r]` to `starts[r + 1]` of `columns`.

    `questions`: what each tile is, a question for every kind of head; `kinds`: which one each query head has.
    """

    starts: Int64
    columns: Int64
    questions: tuple[Question, ...]
    kinds: Int64


@dataclass(frozen=True, eq=False)
class MaskCall:
    """A relation that asks truth tensors, over the rows and keys of one call shape without its data."""

    pattern: Pattern
    shape: CallShape

    @cached_property
    def _shift(self) -> int:
        return whole(self.shape.n_q, self.shape.n_k, self.pattern.align).shift

    @cached_property
    def _group(self) -> int:
        return max(self.shape.heads // max(self.shape.kv_heads, 1), 1)

    def refusal(self, asked: MaskRelation, tiles: Iterable[tuple[int, int]]) -> str | None:
        """Why lists of tiles of such sizes cannot be made on a device; None where they can."""
        most = max(-(-self.shape.n_q // q_tile) * -(-self.shape.n_k // k_tile) for q_tile, k_tile in tiles)
        if most > MOST_TILES or most * self.shape.batch * self.shape.heads >= 1 << 31:
            return f"{most} tiles for each head are too many"
        lengths = {name: x.shape for name, x in self.shape.inputs.items()}
        for one in asked.derived:
            *before, places = lengths[one.of.name]
            lengths[one.tensor.name] = (*before, places + (one.length or 0) + 1)
        for node in walk(asked.relation):
            if isinstance(node, Lookup) and not self._is_inside(node, lengths[node.tensor.name]):
                return f"`{node.tensor.name}` is read at places that are not known to lie inside it"
        return None

    def _is_inside(self, node: Lookup, lengths: tuple[int, ...]) -> bool:
        rows, keys = (0, max(self.shape.n_q, 1)), (0, max(self.shape.n_k, 1))
        for dim, index, length in zip(node.tensor.dims, node.indices, lengths, strict=True):
            if dim in LANES and _is_own(str(dim), index):
                continue
            local = self._local(fold.sub(index, fold.const(self._shift)) if dim == "query" else index, None)
            if reads_data(local):
                return False
            low, high = bounds(local, rows, keys)
            if low < 0 or high >= max(length, 1):
                return False
        return True

    def _local(self, node: Index, head: int | None) -> Index:
        """An expression over the rows and keys of the call, for one head where it is told."""
        shape = self.shape
        sizes = {**shape.sizes, "queries": shape.n_q, "keys": shape.n_k}

        def change(node: Index) -> Index | None:
            match node:
                case Extent():
                    return fold.const(sizes[node.name])
                case HeadIndex(name="head") if head is not None:
                    return fold.const(head)
                case HeadIndex(name="kv_head") if head is not None:
                    return fold.const(head // self._group)
                case Position(name="q"):
                    return fold.add(node, fold.const(self._shift))
                case RoundToInt():
                    return tabulated(node, shape.n_q, shape.n_k)
                case _:
                    return None

        return rewrite(node, change)

    @cached_property
    def _kinds(self) -> tuple[list[tuple[Index, Asking]], Int64]:
        """The relations of heads that differ, but for what they ask, and which one each head has."""
        relation = self._without_lanes(self.pattern.attend.visible)
        heads = range(self.shape.heads) if any(map(_reads_head, _parts(relation))) else [None]
        found: dict[Index, tuple[Index, Asking]] = {}
        kinds = []
        for head in heads:
            local = checked(self._local(relation, head))
            asking = Asking({node: own for node in walk(local) if (own := _stretch(node)) is not None})
            found.setdefault(local, (local, asking))
            kinds.append(list(found).index(local))
        whole_ = np.broadcast_to(np.array(kinds), self.shape.heads) if len(kinds) < 2 else np.array(kinds)
        return list(found.values()), whole_

    def _without_lanes(self, relation: Index) -> Index:
        """Truth tensors of one batch entry and head instead of all of them, by rows of the call."""

        def change(node: Index) -> Index | None:
            if not (isinstance(node, Lookup) and node.tensor.kind == "bool"):
                return None
            own = [*zip(node.tensor.dims, node.indices, strict=True)]
            if not all(_is_own(str(dim), index) for dim, index in own if dim in LANES):
                return None
            rest = [(dim, index) for dim, index in own if dim not in LANES]
            shift = fold.const(self._shift)
            indices = tuple(fold.sub(index, shift) if dim == "query" else index for dim, index in rest)
            return fold.lookup(intern(Tensor(node.tensor.name, "bool", tuple(dim for dim, _ in rest))), indices)

        return rewrite(relation, change)

    def questions(self, q_tile: int, k_tile: int, *, by_key: bool) -> TileQuestions:
        """The tiles of such sizes by rows of queries, or of keys."""
        shape = self.shape
        rows, columns = -(-shape.n_q // q_tile), -(-shape.n_k // k_tile)
        found = [self._possible(*part, q_tile, k_tile) for part in _portions(rows, columns)]
        row, column = (np.concatenate([_NONE, *(part[i] for part in found)]) for i in (0, 1))
        order = np.lexsort((row, column)) if by_key else np.lexsort((column, row))
        row, column = row[order], column[order]
        of_tiles = self._of_tiles(row, column, q_tile, k_tile)
        own, other, count = (column, row, columns) if by_key else (row, column, rows)
        return TileQuestions(np.searchsorted(own, np.arange(count + 1)), other, tuple(of_tiles), self._kinds[1])

    def _possible(self, row: Int64, column: Int64, q_tile: int, k_tile: int) -> tuple[Int64, Int64]:
        """Return the tiles that may be live."""
        states = [possible(question) for question in self._of_tiles(row, column, q_tile, k_tile)]
        (live,) = np.nonzero(np.max(states, axis=0) != FALSE)
        return row[live], column[live]

    def _of_tiles(self, row: Int64, column: Int64, q_tile: int, k_tile: int) -> Iterator[Question]:
        """Yield the questions of tiles, for each kind of head; tiles that an edge cuts have a mask."""
        n_q, n_k = self.shape.n_q, self.shape.n_k
        q_end, k_end = (row + 1) * q_tile, (column + 1) * k_tile
        boxes = Boxes(row * q_tile, np.minimum(q_end, n_q) - 1, column * k_tile, np.minimum(k_end, n_k) - 1)
        edges = np.where((q_end > n_q) | (k_end > n_k), UNKNOWN, TRUE).astype(np.int8)
        for relation, asking in self._kinds[0]:
            question = asking.of(relation, boxes)
            yield joined("and", [*_operands(question), KnownAnswer(edges)])


_NONE: Int64 = np.zeros(0, dtype=np.int64)


def _portions(rows: int, columns: int) -> Iterator[tuple[Int64, Int64]]:
    """Rows and columns of all tiles, some rows at a time."""
    step = max(AT_ONCE // max(columns, 1), 1)
    for start in range(0, rows if columns else 0, step):
        row, column = np.indices((min(step, rows - start), columns))
        yield row.ravel() + start, column.ravel()


def _is_own(dim: str, index: Index) -> bool:
    """Whether an index is the batch entry, the head or the kv head that is computed."""
    head = fold.head_index("head")
    own = {"kv_head": fold.floordiv(head, fold.extent("group"))}
    return index is fold.head_index(dim) or index is own.get(dim)


def _stretch(node: Index) -> tuple[Lookup, Index, Index] | None:
    mask_range = stretch_of(node)
    return (
        None
        if mask_range is None or not is_bare(mask_range.read)
        else (mask_range.read, mask_range.low, mask_range.high)
    )


def _parts(node: Index) -> Iterator[Index]:
    """The conditions that a relation is made of and that read no inputs."""
    if not any(isinstance(below, Lookup) for below in walk(node)):
        yield node
    elif isinstance(node, Bool | Not | ExactSelect):
        for child in node.children():
            yield from _parts(child)


def _reads_head(node: Index) -> bool:
    return any(isinstance(below, HeadIndex) and below.name in ("head", "kv_head") for below in walk(node))


def _operands(question: Question) -> tuple[Question, ...]:
    return question.parts if isinstance(question, JoinedQuestion) and question.op == "and" else (question,)
