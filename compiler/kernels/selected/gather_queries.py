"""The forward and the gradient of q: a program owns a tile of queries that selected one block, and walks its keys."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from attnc.compiler.kernels.depth import pieces
from attnc.compiler.kernels.kernel_source import KernelArgument
from attnc.compiler.kernels.loads import conjunction, entry_numbers, validity
from attnc.compiler.kernels.selected.gather_frame import GatherFrame
from attnc.compiler.kernels.selected.selected_problem import part_width
from attnc.compiler.kernels.value_text import LN_2

SCALE = KernelArgument("scale", "fp32")
"""The factor that turns products into exponents of 2."""


@dataclass
class GatherKernel(GatherFrame):
    """The base of kernels whose programs own gathered queries of one block and walk the block's keys.

    Programs are numbered tile by tile, and head by head within a tile, so that neighbouring programs read one block.
    `tiles_of` has the lane, the side, the first pair and the end of the pairs of each tile. Side 2 i has the pairs of
    block i whose query sees all of its keys; side 2 i + 1 has the other pairs of block i.
    """

    @override
    def write(self) -> None:
        self._program()
        self.load_queries()
        self._keys()
        self.begin()
        with self.lines.loop("tile", "0", "whole"):
            self.tile(masked=False)
        with self.lines.loop("tile", "whole", "keys_tiles"):
            self._masks()
            self.tile(masked=True)
        self.finish()

    @abstractmethod
    def load_queries(self) -> None:
        """Load the rows and numbers of the program's queries."""

    @abstractmethod
    def begin(self) -> None:
        """Emit the lines before the first tile of keys."""

    @abstractmethod
    def tile(self, masked: bool) -> None:
        """Emit the work on a tile of keys."""

    @abstractmethod
    def finish(self) -> None:
        """Emit the lines after the last tile of keys."""

    def _program(self) -> None:
        rows, columns = self.tiles.q_tile, self.tiles.k_tile
        self.pointers("i32", "tiles_of", "starts", "rows_of")
        self.numbers("turns", "lanes_of_batch", "first_lane", "first_head", "span", "group", "lane_pairs")
        self.add(
            "# This program: a tile of pairs of one place and lane, for one of the heads that share them.",
            "turn = tl.program_id(0) % turns",
            "at = tiles_of + tl.program_id(0) // turns * 4",
            "lane = tl.load(at)",
            "side = tl.load(at + 1)",
            f"own = tl.load(at + 2) + tl.arange(0, {rows})",
            "there = own < tl.load(at + 3)",
            "row = tl.load(rows_of + own, mask=there, other=0)",
        )
        self.emit_query_positions("own", "there")
        self.add(
            "start = tl.load(starts + side // 2)",
            "stop = tl.load(starts + side // 2 + 1)",
            f"whole = tl.where(side % 2 == 0, (stop - start) // {columns}, 0)",
            f"keys_tiles = (stop - start + {columns - 1}) // {columns}",
            "batch = ((first_lane + lane) // lanes_of_batch).to(tl.int64)",
            "head = (first_lane + lane) % lanes_of_batch * span + first_head + turn",
            "kv_head = head // group",
        )

    def _keys(self) -> None:
        p, columns = self.problem, self.tiles.k_tile
        self.add(f"column = tl.arange(0, {columns})")
        for name, size in (("k", p.dk), ("v", p.dv)):
            self.add(
                self.head_base(name, "kv_head"),
                f"{name}_at += start * ({name}_token.to(tl.int64) * {p.vector})",
                f"{name}_step = {name}_token.to(tl.int64) * {columns * p.vector}",
                f"{name}_rows = column[:, None] * ({name}_token * {p.vector})",
            )
            for i, piece in enumerate(pieces(size)):
                self.add(f"{name}_inner_{i} = {name}_rows + {entry_numbers(piece)}")

    def load(self, name: str, size: int, masked: bool) -> None:
        """Load a tile of keys or values."""
        for i, piece in enumerate(pieces(size)):
            mask = conjunction("inside[:, None]" if masked else None, validity(piece))
            masked_load = "" if mask is None else f", mask={mask}, other=0.0"
            self.add(f"{name}_{i} = tl.load({name}_at + tile * {name}_step + {name}_inner_{i}{masked_load})")

    def _masks(self) -> None:
        rest, columns = self.problem.rest, self.tiles.k_tile
        self.add(f"key = start + tile * {columns} + column", "inside = key < stop")
        self.emit_positions("inside")
        self.add("visible = inside[None, :]" + (f" & ({self.declare_rest(rest.by_query)})" if rest is not None else ""))

    def emit_part_addresses(self, name: str, size: int) -> None:
        """Emit where the program's rows of partial results begin, and `of_pair`, where their numbers are."""
        self.pointers("fp32", name)
        self.pointers("i32", "pairs")
        self.add(
            "pair = tl.load(pairs + own, mask=there, other=0)",
            "of_pair = (lane.to(tl.int64) * turns + turn) * lane_pairs + pair",
            f"{name}_rows = {name} + of_pair[:, None] * {part_width(size)}",
        )


@dataclass
class GatherForward(GatherKernel):
    """Emits softmax(scale * q kᵀ) v over the keys of a block, and the LSE to base 2."""

    stage: ClassVar[str] = "forward"
    makes: ClassVar[str] = "Output and LSE of every query and each place that it chose"

    @override
    def load_queries(self) -> None:
        self.add(self.head_base("q", "head"), self.row_addresses("q", "row"))
        self.load_rows("q", self.problem.dk, "there")

    @override
    def begin(self) -> None:
        rows = self.tiles.q_tile
        self.arguments["scale"] = SCALE
        self.add(f'most = tl.full(({rows},), float("-inf"), tl.float32)', f"total = tl.zeros(({rows},), tl.float32)")
        self.zero("sum", self.problem.dv, rows)

    @override
    def tile(self, masked: bool) -> None:
        p = self.problem
        self.load("k", p.dk, masked)
        self.product("q", "k", p.dk, "score")
        if masked:
            self.add('score = tl.where(visible, score, float("-inf"))')
        self.add("before = most", "most = tl.maximum(most, tl.max(score, 1) * scale)")
        base = "most"
        if masked:
            self.add('base = tl.where(most == float("-inf"), 0.0, most)')
            base = "base"
        self.add(
            f"weight = tl.exp2(score * scale - {base}[:, None])",
            f"rescale = tl.exp2(before - {base})",
            "total = total * rescale + tl.sum(weight, 1)",
        )
        self.scale_sums("sum", p.dv, "rescale[:, None]")
        self.load("v", p.dv, masked)
        self.add_product("sum", p.dv, "weight", "v")

    @override
    def finish(self) -> None:
        p = self.problem
        self.add(
            "# A row that sees nothing gives 0, and an LSE of -inf.", "divisor = tl.where(total > 0.0, total, 1.0)"
        )
        self.scale_sums("sum", p.dv, "(1.0 / divisor)[:, None]")
        self.emit_part_addresses("part", p.dv)
        self.store_rows("part", p.dv, "there", "sum", "float32")
        self.pointers("fp32", "part_lse")
        part_lse = 'tl.where(total > 0.0, most + tl.log2(divisor), float("-inf"))'
        self.add(f"tl.store(part_lse + of_pair, {part_lse}, mask=there)")


@dataclass
class GatherQueryGradient(GatherKernel):
    """Emits dq = scale * dS k over the keys of a block, where dS = P ∘ (dO vᵀ - delta) with P = exp(S - LSE)."""

    stage: ClassVar[str] = "dq"
    makes: ClassVar[str] = "Gradient of every query by each place that it chose"

    @override
    def load_queries(self) -> None:
        p = self.problem
        self.pointers("fp32", "lse", "delta")
        self.numbers("heads", "queries")
        for name, size in (("q", p.dk), ("dout", p.dv)):
            self.add(self.head_base(name, "head"), self.row_addresses(name, "row"))
            self.load_rows(name, size, "there")
        self.add(
            "of_row = (batch * heads + head) * queries + row",
            'own_lse = tl.load(lse + of_row, mask=there, other=float("inf"))',
            "own_delta = tl.load(delta + of_row, mask=there, other=0.0)",
        )

    @override
    def begin(self) -> None:
        self.arguments["scale"] = SCALE
        self.zero("sum", self.problem.dk, self.tiles.q_tile)

    @override
    def tile(self, masked: bool) -> None:
        p = self.problem
        self.load("k", p.dk, masked)
        self.product("q", "k", p.dk, "score")
        self.add("weight = tl.exp2(score * scale - own_lse[:, None])")
        if masked:
            self.add("weight = tl.where(visible, weight, 0.0)")
        self.load("v", p.dv, masked)
        self.product("dout", "v", p.dv, "change")
        self.add("change = weight * (change - own_delta[:, None])")
        self.add_product("sum", p.dk, "change", "k")

    @override
    def finish(self) -> None:
        p = self.problem
        self.scale_sums("sum", p.dk, f"(scale * {LN_2})")
        self.emit_part_addresses("part", p.dk)
        self.store_rows("part", p.dk, "there", "sum", "float32")
