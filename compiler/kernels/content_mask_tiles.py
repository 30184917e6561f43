"""The tiles of a call that some content of its masks makes live, and the questions to the masks that decide.

Both follow from the sizes of a call alone. The content masks answer the questions on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

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
    fold,
    intern,
)
from attnc.compiler.ir.rewrite import rewrite, walk
from attnc.compiler.ir.verify_ir import checked
from attnc.compiler.kernels.content_masks import MaskRelation, find_mask_range
from attnc.compiler.kernels.inputs import LANES
from attnc.compiler.lowering.float_tables import tabulated
from attnc.compiler.planning.build_plan import CallShape
from attnc.compiler.planning.documents import whole

Int64 = NDArray[np.int64]

MOST_TILES = 1 << 24
"""Maximum number of tiles of a score matrix, each of which is analysed once for the sizes of a call."""

AT_ONCE = 1 << 18
"""Maximum number of tiles that are analysed at a time."""


@dataclass(frozen=True, eq=False)
class TileQuestions:
    """Tiles that may be live, row by row: row r has the tile columns `columns[starts[r]:starts[r + 1]]`.

    `questions`: for every kind of head, the question that decides each tile; `kinds`: the kind of each query head.
    """

    starts: Int64
    columns: Int64
    questions: tuple[Question, ...]
    kinds: Int64


@dataclass(frozen=True, eq=False)
class MaskCall:
    """A relation that reads content masks, over the rows and keys of one call shape without its data."""

    pattern: Pattern
    shape: CallShape

    @cached_property
    def _shift(self) -> int:
        return whole(self.shape.n_q, self.shape.n_k, self.pattern.align).shift

    @cached_property
    def _group(self) -> int:
        return max(self.shape.heads // max(self.shape.kv_heads, 1), 1)

    def refusal(self, mask_relation: MaskRelation, tiles: Iterable[tuple[int, int]]) -> str | None:
        """Return why lists of tiles of these sizes cannot be made on a device; None if they can."""
        count = max(-(-self.shape.n_q // q_tile) * -(-self.shape.n_k // k_tile) for q_tile, k_tile in tiles)
        if count > MOST_TILES or count * self.shape.batch * self.shape.heads >= 1 << 31:
            return f"{count} tiles for each head are too many for lists on the device"
        lengths = {name: x.shape for name, x in self.shape.inputs.items()}
        for mask in mask_relation.derived:
            *leading, length = lengths[mask.of.name]
            lengths[mask.tensor.name] = (*leading, length + (mask.length or 0) + 1)
        for node in walk(mask_relation.relation):
            if isinstance(node, Lookup) and not self._is_inside(node, lengths[node.tensor.name]):
                return f"`{node.tensor.name}` is read at positions that may be out of range"
        return None

    def _is_inside(self, node: Lookup, lengths: tuple[int, ...]) -> bool:
        """Whether all indices of a lookup are known to lie in range."""
        rows, keys = (0, max(self.shape.n_q, 1)), (0, max(self.shape.n_k, 1))
        for dim, index, length in zip(node.tensor.dims, node.indices, lengths, strict=True):
            if dim in LANES and _is_own_lane(str(dim), index):
                continue
            local = self._local(fold.sub(index, fold.const(self._shift)) if dim == "query" else index, None)
            if reads_data(local):
                return False
            low, high = bounds(local, rows, keys)
            if low < 0 or high >= max(length, 1):
                return False
        return True

    def _local(self, node: Index, head: int | None) -> Index:
        """Return an expression over the rows and keys of the call, for one head if `head` is given."""
        shape = self.shape
        sizes = {**shape.sizes, "queries": shape.n_q, "keys": shape.n_k}

        def substitute_call(node: Index) -> Index | None:
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

        return rewrite(node, substitute_call)

    @cached_property
    def _kinds(self) -> tuple[list[tuple[Index, Asking]], Int64]:
        """The different relations of heads, each with its reads of masks, and the number of each head's relation."""
        relation = self._without_lanes(self.pattern.attend.visible)
        heads = range(self.shape.heads) if any(map(_reads_head, _conditions_without_inputs(relation))) else [None]
        relations: dict[Index, tuple[Index, Asking]] = {}
        kinds = []
        for head in heads:
            local = checked(self._local(relation, head))
            asking = Asking(
                {node: mask_range for node in walk(local) if (mask_range := _bare_mask_range(node)) is not None}
            )
            relations.setdefault(local, (local, asking))
            kinds.append(list(relations).index(local))
        kinds_of_heads = np.broadcast_to(np.array(kinds), self.shape.heads) if len(kinds) < 2 else np.array(kinds)
        return list(relations.values()), kinds_of_heads

    def _without_lanes(self, relation: Index) -> Index:
        """Replace truth tensors by those of one batch entry and head, indexed by rows of the call."""

        def drop_lanes(node: Index) -> Index | None:
            if not (isinstance(node, Lookup) and node.tensor.kind == "bool"):
                return None
            indexed_dims = [*zip(node.tensor.dims, node.indices, strict=True)]
            if not all(_is_own_lane(str(dim), index) for dim, index in indexed_dims if dim in LANES):
                return None
            rest = [(dim, index) for dim, index in indexed_dims if dim not in LANES]
            shift = fold.const(self._shift)
            indices = tuple(fold.sub(index, shift) if dim == "query" else index for dim, index in rest)
            return fold.lookup(intern(Tensor(node.tensor.name, "bool", tuple(dim for dim, _ in rest))), indices)

        return rewrite(relation, drop_lanes)

    def questions(self, q_tile: int, k_tile: int, *, by_key: bool) -> TileQuestions:
        """Return the tiles of this size and their questions, by rows of queries or of keys."""
        shape = self.shape
        rows, columns = -(-shape.n_q // q_tile), -(-shape.n_k // k_tile)
        portions = [self._possible_tiles(*portion, q_tile, k_tile) for portion in _portions(rows, columns)]
        row, column = (np.concatenate([_NONE, *(portion[i] for portion in portions)]) for i in (0, 1))
        order = np.lexsort((row, column)) if by_key else np.lexsort((column, row))
        row, column = row[order], column[order]
        tile_questions = self._tile_questions(row, column, q_tile, k_tile)
        rows_of_tiles, columns_of_tiles, count = (column, row, columns) if by_key else (row, column, rows)
        return TileQuestions(
            np.searchsorted(rows_of_tiles, np.arange(count + 1)),
            columns_of_tiles,
            tuple(tile_questions),
            self._kinds[1],
        )

    def _possible_tiles(self, row: Int64, column: Int64, q_tile: int, k_tile: int) -> tuple[Int64, Int64]:
        """Return the tiles that may be live."""
        states = [possible(question) for question in self._tile_questions(row, column, q_tile, k_tile)]
        (live,) = np.nonzero(np.max(states, axis=0) != FALSE)
        return row[live], column[live]

    def _tile_questions(self, row: Int64, column: Int64, q_tile: int, k_tile: int) -> Iterator[Question]:
        """Yield the questions of tiles, for each kind of head; tiles that an edge cuts have a mask."""
        n_q, n_k = self.shape.n_q, self.shape.n_k
        q_end, k_end = (row + 1) * q_tile, (column + 1) * k_tile
        boxes = Boxes(row * q_tile, np.minimum(q_end, n_q) - 1, column * k_tile, np.minimum(k_end, n_k) - 1)
        edges = np.where((q_end > n_q) | (k_end > n_k), UNKNOWN, TRUE).astype(np.int8)
        for relation, asking in self._kinds[0]:
            question = asking.of(relation, boxes)
            yield joined("and", [*_conjuncts(question), KnownAnswer(edges)])


_NONE: Int64 = np.zeros(0, dtype=np.int64)


def _portions(rows: int, columns: int) -> Iterator[tuple[Int64, Int64]]:
    """Yield the rows and columns of all tiles, some rows at a time."""
    step = max(AT_ONCE // max(columns, 1), 1)
    for start in range(0, rows if columns else 0, step):
        row, column = np.indices((min(step, rows - start), columns))
        yield row.ravel() + start, column.ravel()


def _is_own_lane(dim: str, index: Index) -> bool:
    """Whether an index is the batch entry, the head or the kv head that is computed."""
    head = fold.head_index("head")
    indices = {"kv_head": fold.floordiv(head, fold.extent("group"))}
    return index is fold.head_index(dim) or index is indices.get(dim)


def _bare_mask_range(node: Index) -> tuple[Lookup, Index, Index] | None:
    """Return the lookup, the low and the high end of an aggregate over a range of a bare mask; None for others."""
    mask_range = find_mask_range(node)
    return (
        None
        if mask_range is None or not is_bare(mask_range.read)
        else (mask_range.read, mask_range.low, mask_range.high)
    )


def _conditions_without_inputs(node: Index) -> Iterator[Index]:
    """Yield the conditions inside a relation that read no inputs."""
    if not any(isinstance(part, Lookup) for part in walk(node)):
        yield node
    elif isinstance(node, Bool | Not | ExactSelect):
        for child in node.children():
            yield from _conditions_without_inputs(child)


def _reads_head(node: Index) -> bool:
    return any(isinstance(part, HeadIndex) and part.name in ("head", "kv_head") for part in walk(node))


def _conjuncts(question: Question) -> tuple[Question, ...]:
    return question.parts if isinstance(question, JoinedQuestion) and question.op == "and" else (question,)
