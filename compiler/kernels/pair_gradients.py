"""Gradients of what a score reads pair by pair: a table by distance, or one whose index is another input's.

Many pairs share an entry. So that sums are made in one order, without atomics, a program keeps entries of its own: of a
table by distance it walks tiles along a diagonal of the matrix, of any other table it has 32 entries and a row of
tiles. What programs leave is added up outside.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from typing_extensions import override

from attnc.compiler.ir import Element, Tensor
from attnc.compiler.kernels.attention_problem import PAIRS, AttentionProblem
from attnc.compiler.kernels.index_text import ExprText, IndexText, NotInKernelsError
from attnc.compiler.kernels.kernel_source import KernelArgument, KernelSource
from attnc.compiler.kernels.query_gradient import QueryGradient
from attnc.compiler.kernels.score_formula import Term
from attnc.compiler.kernels.walks import RangedWalk
from attnc.compiler.simulation.gpu_clocks import TileShape

ENTRIES = 32
"""Entries of a table that a program has."""


def emit_distance_gradient(problem: AttentionProblem, term: Term, tiles: TileShape) -> KernelSource:
    """The gradient of a term of the distance.

    `sums` (lanes, diagonals, 2 · tile - 1): of program (lane, i) the distances
    `(i - columns + 1) * tile + j - tile + 1` for each j, in tokens of the call, where there are so many columns of
    tiles. Raises NotInKernelsError where tiles are listed or bricks.
    """
    if not isinstance(problem.by_query, RangedWalk):
        raise NotInKernelsError("gradients of tables by distance where rows see no ranges of keys")
    return _Distances(replace(problem, boxes=False), tiles, term=term).source()


def emit_table_gradient(problem: AttentionProblem, tensor: Tensor, tiles: TileShape) -> KernelSource:
    """The gradient of an input that is read pair by pair: `sums` (lanes, tile rows, chunks, 32).

    Raises NotInKernelsError where more than one index differs from pair to pair, and where tiles are listed or bricks.
    """
    if not isinstance(problem.by_query, RangedWalk):
        raise NotInKernelsError("gradients of inputs read pair by pair where rows see no ranges of keys")
    return _Table(replace(problem, boxes=False), tiles, tensor=tensor).source()


@dataclass
class _Pairs(QueryGradient):
    """Programs that only need how the result changes with the scores."""

    stage: ClassVar[str] = "pairs"
    written: ClassVar[tuple[str, ...]] = ()

    @override
    def more_pointers(self) -> list[KernelArgument]:
        return [KernelArgument("sums", "*fp32")]

    @override
    def gradients(self) -> list[str]:
        return []


@dataclass
class _Distances(_Pairs):
    term: Term = field(kw_only=True)

    @property
    @override
    def title(self) -> str:
        return f"d{self.term.tensor.name}"

    @override
    def write(self, texts: IndexText) -> None:
        add, p, side = self.lines.add, self.problem, self.tiles.q_tile
        assert self.tiles.k_tile == side
        assert isinstance(self.walk, RangedWalk)
        add("# This program: the tiles along one diagonal of a lane, which is a batch entry and a head.")
        add("lane = tl.program_id(0) % lanes")
        self.heads()
        add(f"row_tiles = (queries + {side - 1}) // {side}", f"column_tiles = (keys + {side - 1}) // {side}")
        add("diagonal = tl.program_id(0) // lanes - (column_tiles - 1)")
        add(f"column = tl.arange(0, {side})", f"found = tl.zeros(({side}, {side}), tl.float32)")
        self.moving("k", "kv_head", p.dk)
        self.moving("v", "kv_head", p.dv)
        with self.lines.block(
            "for row_tile in range(tl.maximum(diagonal, 0), tl.minimum(row_tiles, column_tiles + diagonal)):"
        ):
            add("tile = row_tile - diagonal")
            self.own_places()
            self.walk.start(self.lines, self.sides, texts, self.moved())
            add(f"live = {self.walk.live()}")
            with self.lines.block("if live:"):
                self.own_rows()
                self.load_terms("query", "there", "row", "own")
                add(f"key = tile * {side} + column")
                self.walk.visible(self.lines, self.sides, self.texts)
                self.moving_terms(True)
                self.change("tile", True)
                assert p.score is not None
                by = p.score.by_term(self.term)
                assert by is not None
                add(f"found += {self.pushed(by, 'change', True)}")
        add("", "# Every distance on the diagonal, one after another.")
        along = f"tl.arange(0, {side})"
        add(f"gap = {along}[:, None] - {along}[None, :]")
        add("number = lane.to(tl.int64) * (row_tiles + column_tiles - 1) + tl.program_id(0) // lanes")
        add(f"at = sums + number * {2 * side - 1}")
        with self.lines.block(f"for i in range({2 * side - 1}):"):
            add(f"tl.store(at + i, tl.sum(tl.where(gap == i - {side - 1}, found, 0.0)))")


@dataclass
class _Table(_Pairs):
    tensor: Tensor = field(kw_only=True)

    @property
    @override
    def title(self) -> str:
        return f"d{self.tensor.name}"

    @override
    def start(self) -> None:
        self.lines.add("chunk = tl.program_id(1)", f"entry = tl.arange(0, {ENTRIES})")
        self.lines.add("", f"found = tl.zeros(({ENTRIES},), tl.float32)")
        self.own_rows()
        self.moving("k", "kv_head", self.problem.dk)
        self.moving("v", "kv_head", self.problem.dv)

    @override
    def tile(self, tile: str, partial: bool) -> None:
        self.change(tile, partial)
        score, add = self.problem.score, self.lines.add
        assert score is not None
        atoms = [d for d in score.derivatives if isinstance(d.atom, Element) and d.atom.tensor is self.tensor]
        for by in atoms:
            assert isinstance(by.atom, Element)
            add(f"entries = {self._index(by.atom).over(PAIRS).text} - chunk * {ENTRIES}")
            add(f"pushed = {self.pushed(by, 'change', partial)}")
            with self.lines.block(f"for i in range({ENTRIES}):"):
                add("one = tl.sum(tl.where(entries == i, pushed, 0.0))")
                add("found = tl.where(entry == i, found + one, found)")

    def _index(self, node: Element) -> ExprText:
        """The one index that differs from pair to pair."""
        texts = [self.texts.of(index) for index in node.indices]
        varying = [text for text in texts if text.axes]
        if len(varying) != 1:
            raise NotInKernelsError(f"the gradient of `{node.tensor.name}`, of which several indices differ by pair")
        return varying[0]

    @override
    def finish(self) -> None:
        tiles = "tl.num_programs(0) // lanes"
        self.lines.add(f"at = (lane.to(tl.int64) * ({tiles}) + row_tile) * tl.num_programs(1) + chunk")
        self.lines.add(f"tl.store(sums + at * {ENTRIES} + entry, found)")


def varying_dimension(tensor: Tensor) -> int:
    """The dimension of a tensor along which pairs differ. Raises NotInKernelsError where it is not one."""
    found = [i for i, dim in enumerate(tensor.dims) if dim not in ("batch", "head", "kv_head")]
    if len(found) != 1:
        raise NotInKernelsError(f"the gradient of `{tensor.name}`, of which several indices differ by pair")
    return found[0]
