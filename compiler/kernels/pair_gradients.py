"""Gradients of inputs that a score reads pair by pair: tables by distance, and tables whose index is another input.

Many pairs share an entry. So that sums have one order and need no atomics, each program owns some entries: for a table
by distance, a program walks the tiles along one diagonal of the score matrix; for any other table, it owns 32 entries
and walks one row of tiles. The sums of all programs are added up outside the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from typing_extensions import override

from attnc.compiler.ir import Element, Tensor
from attnc.compiler.kernels.attention_problem import PAIRS, AttentionProblem
from attnc.compiler.kernels.index_text import ExprText, IndexText, NotInKernelsError
from attnc.compiler.kernels.kernel_source import KernelArgument, KernelSource, TileShape
from attnc.compiler.kernels.query_gradient import QueryGradient
from attnc.compiler.kernels.score_formula import Term
from attnc.compiler.kernels.walks import RangedWalk

ENTRIES = 32
"""Number of table entries that a program owns."""


def emit_distance_gradient(problem: AttentionProblem, term: Term, tiles: TileShape) -> KernelSource:
    """Emit the kernel for the gradient of a term by distance.

    It writes `sums` (lanes, diagonals, 2 · tile - 1). Entry j of program (lane, i) is the sum at the distance
    `(i - columns + 1) * tile + j - tile + 1`, in tokens of the call, where `columns` is the number of tile columns.
    Raises NotInKernelsError if tiles are listed or bricks.
    """
    if not isinstance(problem.by_query, RangedWalk):
        raise NotInKernelsError("gradients of tables by distance, unless each row sees a few ranges of keys")
    return _Distances(replace(problem, boxes=False), tiles, term=term).source()


def emit_table_gradient(problem: AttentionProblem, tensor: Tensor, tiles: TileShape) -> KernelSource:
    """Emit the kernel for the gradient of an input that is read pair by pair.

    It writes `sums` (lanes, tile rows, chunks, 32). Raises NotInKernelsError if more than one index differs from pair
    to pair, or if tiles are listed or bricks.
    """
    if not isinstance(problem.by_query, RangedWalk):
        raise NotInKernelsError("gradients of inputs read pair by pair, unless each row sees a few ranges of keys")
    return _Table(replace(problem, boxes=False), tiles, tensor=tensor).source()


@dataclass
class _Pairs(QueryGradient):
    """The base of kernels that compute the gradient of the scores and sum it into table entries."""

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
        self.emit_heads()
        add(f"row_tiles = (queries + {side - 1}) // {side}", f"column_tiles = (keys + {side - 1}) // {side}")
        add("diagonal = tl.program_id(0) // lanes - (column_tiles - 1)")
        add(f"column = tl.arange(0, {side})", f"found = tl.zeros(({side}, {side}), tl.float32)")
        self.emit_tile_addresses("k", "kv_head", p.dk)
        self.emit_tile_addresses("v", "kv_head", p.dv)
        with self.lines.block(
            "for row_tile in range(tl.maximum(diagonal, 0), tl.minimum(row_tiles, column_tiles + diagonal)):"
        ):
            add("tile = row_tile - diagonal")
            self.emit_rows()
            self.walk.start(self.lines, self.sides, texts, self.position_offset())
            add(f"live = {self.walk.live()}")
            with self.lines.block("if live:"):
                self.load_rows()
                self.load_terms("query", "there", "row", "own")
                add(f"key = tile * {side} + column")
                self.walk.visible(self.lines, self.sides, self.texts)
                self.moving_terms(True)
                self.emit_score_gradient("tile", True)
                assert p.score is not None
                derivative = p.score.by_term(self.term)
                assert derivative is not None
                add(f"found += {self.atom_gradient(derivative, 'change', True)}")
        add("", "# Every distance on the diagonal, one after another.")
        numbers = f"tl.arange(0, {side})"
        add(f"gap = {numbers}[:, None] - {numbers}[None, :]")
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
        self.load_rows()
        self.emit_tile_addresses("k", "kv_head", self.problem.dk)
        self.emit_tile_addresses("v", "kv_head", self.problem.dv)

    @override
    def tile(self, tile: str, partial: bool) -> None:
        self.emit_score_gradient(tile, partial)
        score, add = self.problem.score, self.lines.add
        assert score is not None
        table_derivatives = [
            d for d in score.derivatives if isinstance(d.atom, Element) and d.atom.tensor is self.tensor
        ]
        for derivative in table_derivatives:
            assert isinstance(derivative.atom, Element)
            add(f"entries = {self._varying_index(derivative.atom).over(PAIRS).text} - chunk * {ENTRIES}")
            add(f"pushed = {self.atom_gradient(derivative, 'change', partial)}")
            with self.lines.block(f"for i in range({ENTRIES}):"):
                add("one = tl.sum(tl.where(entries == i, pushed, 0.0))")
                add("found = tl.where(entry == i, found + one, found)")

    def _varying_index(self, node: Element) -> ExprText:
        """Return the text of the only index that differs from pair to pair."""
        texts = [self.texts.of(index) for index in node.indices]
        varying = [text for text in texts if text.axes]
        if len(varying) != 1:
            raise NotInKernelsError(
                f"the gradient of `{node.tensor.name}`, where several indices differ from pair to pair"
            )
        return varying[0]

    @override
    def finish(self) -> None:
        tiles = "tl.num_programs(0) // lanes"
        self.lines.add(f"at = (lane.to(tl.int64) * ({tiles}) + row_tile) * tl.num_programs(1) + chunk")
        self.lines.add(f"tl.store(sums + at * {ENTRIES} + entry, found)")


def varying_dimension(tensor: Tensor) -> int:
    """Return the only dimension of a tensor along which pairs differ. Raises NotInKernelsError if there is not one."""
    varying = [i for i, name in enumerate(tensor.dims) if name not in ("batch", "head", "kv_head")]
    if len(varying) != 1:
        raise NotInKernelsError(f"the gradient of `{tensor.name}`, where several indices differ from pair to pair")
    return varying[0]
