"""The gradients of k and v: a program owns keys of a block, and walks the pairs of all queries that selected it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from attnc.compiler.kernels.selected.gather_frame import GatherFrame
from attnc.compiler.kernels.selected.gather_queries import SCALE
from attnc.compiler.kernels.value_text import LN_2


@dataclass
class GatherKeyGradients(GatherFrame):
    """Emits dk = scale * dSᵀ q and dv = Pᵀ dO. `begins`: where the pairs of each side of a lane's blocks begin.

    The pairs of a block's two sides are adjacent: those whose query sees all of the block's keys come first, and whole
    tiles of these need no mask.
    """

    stage: ClassVar[str] = "dkdv"
    makes: ClassVar[str] = "Gradients of keys and values"

    @override
    def write(self) -> None:
        self._program()
        self._own_keys()
        heads = ["head = kv_head * group + member" if self.problem.grouped else "head = kv_head * group"]
        heads += [self.head_base("q", "head"), self.head_base("dout", "head")]
        heads += ["of_head = (batch * heads + head) * queries"]
        if self.problem.grouped:
            self.lines.turns = tuple(heads)
        else:
            self.add(*heads)
        self.lines.guarded = self.problem.target.name == "sm_90"
        with self.lines.loop("tile", "0", "whole"):
            self._tile(masked=False)
        with self.lines.loop("tile", "whole", "pair_tiles"):
            self._tile(masked=True)
        self.lines.turns, self.lines.guarded = (), False
        self._store()

    def _program(self) -> None:
        rows, columns = self.tiles.q_tile, self.tiles.k_tile
        self.pointers("i32", "key_tiles", "starts", "begins", "rows_of")
        self.pointers("fp32", "lse", "delta")
        self.numbers("kv_lanes", "kv_turns", "lanes_of_batch", "first_lane", "group", "heads", "queries", "sides")
        self.arguments["scale"] = SCALE
        self.add(
            "# This program: keys of a place, for one head of keys.",
            "kv_lane = tl.program_id(0) % kv_lanes",
            "lane = kv_lane // kv_turns",
            "at = key_tiles + tl.program_id(0) // kv_lanes * 2",
            "place = tl.load(at)",
            f"key = tl.load(at + 1) + tl.arange(0, {columns})",
            "there = key < tl.load(starts + place + 1)",
            "at = begins + lane * sides + place * 2",
            "first = tl.load(at)",
            "last = tl.load(at + 2)",
            f"whole = (tl.load(at + 1) - first) // {rows}",
            f"pair_tiles = (last - first + {rows - 1}) // {rows}",
            "batch = ((first_lane + lane) // lanes_of_batch).to(tl.int64)",
            "kv_head = (first_lane + lane) % lanes_of_batch * kv_turns + kv_lane % kv_turns",
            f"column = tl.arange(0, {rows})",
        )
        self.emit_positions("there")

    def _own_keys(self) -> None:
        p = self.problem
        for name, size in (("k", p.dk), ("v", p.dv)):
            self.add(self.head_base(name, "kv_head"), self.row_addresses(name, "key"))
            self.load_rows(name, size, "there")
        self.zero("key_sum", p.dk, self.tiles.k_tile)
        self.zero("value_sum", p.dv, self.tiles.k_tile)

    def _tile(self, masked: bool) -> None:
        p = self.problem
        inside = "inside" if masked else None
        self.add(f"own = first + tile * {self.tiles.q_tile} + column")
        if masked:
            self.add("inside = own < last")
        self.add(f"row = tl.load(rows_of + own{', mask=inside, other=0' if masked else ''})")
        self.add(self.row_addresses("q", "row"))
        self.load_rows("q", p.dk, inside)
        self.product("k", "q", p.dk, "score")
        self.add(f"of_lse = tl.load(lse + of_head + row{_masked(masked, INFINITE)})")
        self.add("weight = tl.exp2(score * scale - of_lse[None, :])")
        if masked and p.rest is not None:
            self.emit_query_positions("own", "inside")
            self.add(f"weight = tl.where({self.declare_rest(p.rest.by_key)}, weight, 0.0)")
        self.add(self.row_addresses("dout", "row"))
        self.load_rows("dout", p.dv, inside)
        self.add_product("value_sum", p.dv, "weight", "dout")
        self.add(f"of_delta = tl.load(delta + of_head + row{_masked(masked, '0.0')})")
        self.product("v", "dout", p.dv, "change")
        self.add("change = weight * (change - of_delta[None, :])")
        self.add_product("key_sum", p.dk, "change", "q")

    def _store(self) -> None:
        p = self.problem
        self.scale_sums("key_sum", p.dk, f"(scale * {LN_2})")
        for name, sums, size in (("dk", "key_sum", p.dk), ("dv", "value_sum", p.dv)):
            self.add(self.head_base(name, "kv_head"), self.row_addresses(name, "key"))
            self.store_rows(name, size, "there", sums, p.dtype)


INFINITE = 'float("inf")'


def _masked(masked: bool, other: str) -> str:
    return f", mask=inside, other={other}" if masked else ""
