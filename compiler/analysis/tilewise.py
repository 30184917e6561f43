"""Analysis of a relation on many boxes of a grid of tiles; each condition is analysed once for all equal boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.block_conditions import refine
from attnc.compiler.analysis.box_values import FALSE, TRUE, Truths, decided, junction, junction_state, negated
from attnc.compiler.analysis.grid import TileGrid
from attnc.compiler.analysis.hashing import Hash, combine, constant_hash, mix
from attnc.compiler.analysis.intervals import Analysis, Boxes
from attnc.compiler.analysis.translation import Dependence, Dependences
from attnc.compiler.ir import Bool, Index, Not

Int64 = NDArray[np.int64]

CHUNK = 1 << 16
"""Number of boxes to analyse at once; bounds the memory of an analysis."""


@dataclass(frozen=True, eq=False)
class Squares:
    """Boxes of `size` × `size` tiles of a grid, by number of row and column."""

    grid: TileGrid
    size: int
    rows: Int64
    columns: Int64

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: Int64 | slice) -> Squares:
        """Return a selection of the squares, by number."""
        return Squares(self.grid, self.size, self.rows[which], self.columns[which])

    def where(self, which: NDArray[np.bool_]) -> Squares:
        """Return the marked squares."""
        marked = np.flatnonzero(which)
        return self if len(marked) == len(self) else self.take(marked)

    @cached_property
    def boxes(self) -> Boxes:
        """The rows and keys of the squares, clipped to the matrix."""
        grid, size = self.grid, self.size
        q_low = self.rows * (size * grid.q_tile)
        k_low = self.columns * (size * grid.k_tile) + grid.k_origin
        q_high = np.minimum(q_low + (size * grid.q_tile - 1), grid.n_q - 1)
        k_high = np.minimum(k_low + (size * grid.k_tile - 1), grid.n_k - 1)
        return Boxes(q_low, q_high, np.maximum(k_low, 0), k_high)

    @property
    def clipped(self) -> Int64 | int:
        """The edges of the matrix that cut each box, as bits for last rows, first keys and last keys; mostly 0."""
        grid, size = self.grid, self.size
        last_row, below = divmod(grid.n_q, size * grid.q_tile)
        last_column, behind = divmod(grid.n_k - grid.k_origin, size * grid.k_tile)
        cut: Int64 | int = 0
        for edge, is_at_edge, bit in ((below, self.rows >= last_row, 1), (grid.k_origin, self.columns == 0, 2)):
            cut = cut + is_at_edge * np.int64(bit) if edge else cut
        return cut + (self.columns >= last_column) * np.int64(4) if behind else cut

    def extents(self) -> Hash:
        """Return a hash of the height and width of each box."""
        alike = _alike(np.broadcast_to(self.clipped, len(self)), 8)
        boxes = self.take(alike.first).boxes
        sizes = combine(mix(boxes.q_high - boxes.q_low), mix(boxes.k_high - boxes.k_low))
        return sizes[alike.number]


@dataclass(frozen=True, slots=True)
class _Alike:
    """The index of one entry of each kind, and the number of the kind of every entry."""

    first: Int64
    number: Int64


def _alike(kinds: Int64, count: int) -> _Alike:
    """Group equal numbers below `count`; kinds are in ascending order."""
    index_of_kind = np.full(count, -1, dtype=np.int64)
    index_of_kind[kinds] = np.arange(len(kinds))
    present = np.flatnonzero(index_of_kind >= 0)
    first = index_of_kind[present]
    index_of_kind[present] = np.arange(len(present))
    return _Alike(first, index_of_kind[kinds])


class Tilewise:
    """A relation on the boxes of a grid."""

    def __init__(self, relation: Index, grid: TileGrid) -> None:
        self._relation = relation
        self._box = grid.q_tile if grid.q_tile == grid.k_tile else None
        self._dependences = Dependences()
        self._along: dict[tuple[Index, int], Dependence] = {}

    @cached_property
    def is_simple(self) -> bool:
        """Whether every condition is equal along rows, columns or diagonals of boxes, so few boxes are analysed."""
        return all(dependence.along != "both" for dependence in self.conditions.values())

    @cached_property
    def conditions(self) -> Mapping[Index, Dependence]:
        """The dependence of the largest conditions that share values between tiles, and of all other parts."""
        result: dict[Index, Dependence] = {}
        stack = [self._relation]
        while stack:
            node = stack.pop()
            along = self.along(node, 1)
            if along.along == "both" and isinstance(node, Bool | Not):
                stack.extend(node.children())
            else:
                result[node] = along
        return result

    def states(self, squares: Squares) -> NDArray[np.int8]:
        """Return the state of the relation on each box: TRUE, FALSE or UNKNOWN."""
        return _Pass(self, squares, keyed=False).truth(self._relation).state

    def keys(self, squares: Squares) -> Hash:
        """Return a key for each box: boxes of equal size with equal keys hold equal relations."""
        return _Pass(self, squares, keyed=True).truth(self._relation).key

    def along(self, node: Index, size: int) -> Dependence:
        """Return the dependence of a condition over boxes of size × size tiles."""
        if (node, size) not in self._along:
            box = None if self._box is None else self._box * size
            self._along[node, size] = self._dependences.of(node, box)
        return self._along[node, size]


class _Pass:
    """The analysis of a relation on one set of boxes."""

    def __init__(self, relation: Tilewise, squares: Squares, *, keyed: bool) -> None:
        self._relation = relation
        self._squares = squares
        self._keyed = keyed
        self._parts: dict[Dependence, tuple[Analysis, Int64]] = {}
        self._analyses: list[Analysis] = []

    def truth(self, node: Index) -> Truths:
        along = self._relation.along(node, self._squares.size)
        if along.along != "both":
            analysis, number = self._part(along)
            truths = analysis.truth(node)
            state = np.broadcast_to(truths.state, analysis.size)[number]
            if not self._keyed:
                return decided(state)
            # The key may contain the box that was analysed, so it also says along which direction boxes share it.
            key = combine(truths.key, constant_hash((along.along, along.step)))
            return Truths(state, np.broadcast_to(key, analysis.size)[number])
        match node:
            case Not():
                return negated(self.truth(node.operand), keyed=self._keyed)
            case Bool():
                return self._junction(node) if self._keyed else self._junction_state(node)
            case _:
                return self._everywhere(node)

    def _part(self, along: Dependence) -> tuple[Analysis, Int64]:
        """The analysis of one box of each kind, and the kind of every box."""
        if along not in self._parts:
            alike = self._kinds(along)
            self._parts[along] = self._analysis(self._squares.take(alike.first)), alike.number
        return self._parts[along]

    def _analysis(self, squares: Squares) -> Analysis:
        return Analysis(squares.boxes, keyed=self._keyed, refine=refine if self._keyed or squares.size == 1 else None)

    def _kinds(self, along: Dependence) -> _Alike:
        squares = self._squares
        rows, columns = (-(-n // squares.size) for n in (squares.grid.rows, squares.grid.columns))
        match along.along:
            case "nothing":
                return _alike(np.zeros(len(squares), dtype=np.int64), 1)
            case "rows":
                return _alike(squares.rows, rows)
            case "columns":
                return _alike(squares.columns, columns)
            case _:
                span = rows + columns
                kinds = squares.columns - squares.rows + rows
                family, families = squares.clipped, 8
                if along.step > 1:
                    family, families = family * along.step + squares.rows % along.step, 8 * along.step
                if isinstance(family, int):
                    return _alike(kinds, span)
                return _alike(kinds + family * span, families * span)

    def _junction(self, node: Bool) -> Truths:
        return junction(node.op, [self.truth(operand) for operand in node.operands], keyed=True)

    def _junction_state(self, node: Bool) -> Truths:
        """Evaluate operands that differ on every box last, and only on boxes that the other operands leave open."""
        size = self._squares.size
        order = sorted(node.operands, key=lambda o: self._relation.along(o, size).along == "both")
        simple = [o for o in order if self._relation.along(o, size).along != "both"]
        closing = FALSE if node.op == "and" else TRUE
        state = np.full(len(self._squares), -closing, dtype=np.int8)
        for operand in simple:
            state = junction_state(node.op, state, self.truth(operand).state)
        for operand in order[len(simple) :]:
            undecided = np.flatnonzero(state != closing)
            if len(undecided) == len(state):
                state = junction_state(node.op, state, self.truth(operand).state)
            elif len(undecided):
                inner = _Pass(self._relation, self._squares.take(undecided), keyed=False).truth(operand).state
                state[undecided] = junction_state(node.op, state[undecided], inner)
        return decided(state)

    def _everywhere(self, node: Index) -> Truths:
        """Analyse a condition on every box, in chunks."""
        n = len(self._squares)
        if not self._analyses:
            self._analyses = [self._analysis(self._squares.take(slice(i, i + CHUNK))) for i in range(0, n, CHUNK)]
        truths = [(analysis.truth(node), analysis.size) for analysis in self._analyses]
        state = np.concatenate([np.broadcast_to(t.state, size) for t, size in truths])
        if not self._keyed:
            return decided(state)
        return Truths(state, np.concatenate([np.broadcast_to(t.key, size) for t, size in truths]))
