"""Kernels that merge a query's partial results over its blocks: outputs by their LSE, gradients as sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from attnc.compiler.kernels.depth import pieces
from attnc.compiler.kernels.loads import conjunction, entry_numbers, validity
from attnc.compiler.kernels.selected.gather_frame import GatherFrame
from attnc.compiler.kernels.selected.selected_problem import part_width
from attnc.compiler.kernels.value_text import LN_2


@dataclass
class MergeFrame(GatherFrame):
    """The base of kernels that merge. Programs are numbered head by head, and by tiles of queries within a head.

    `slots_of` has the side of each pair.
    """

    def _program(self, name: str, size: int) -> None:
        """Emit the program's rows and where their first partial results are."""
        rows = self.tiles.q_tile
        self.pointers("i32", "slots_of")
        self.pointers("fp32", "part")
        self.numbers("turns", "shared", "lanes_of_batch", "first_lane", "first_head", "span", "queries")
        self.numbers("slots", "none")
        self.add(
            "# This program: queries of one head.",
            f"row_tiles = (queries + {rows - 1}) // {rows}",
            "unit = tl.program_id(0) // row_tiles",
            f"row = tl.program_id(0) % row_tiles * {rows} + tl.arange(0, {rows})",
            "there = row < queries",
            "lane = first_lane + unit // shared",
            "batch = (lane // lanes_of_batch).to(tl.int64)",
            "head = lane % lanes_of_batch * span + first_head + unit % shared",
            "at = ((unit // turns).to(tl.int64) * queries + row) * slots",
            "of_pair = (unit.to(tl.int64) * queries + row) * slots",
            self.head_base(name, "head"),
            self.row_addresses(name, "row"),
        )
        self.zero("sum", size, rows)

    def _emit_slot(self) -> None:
        """Emit which rows have a pair in the slot."""
        self.add("live = tl.load(slots_of + at + slot, mask=there, other=none) < none")

    def _add_parts(self, size: int, weighted: bool) -> None:
        """Add the partial results of a slot to the sums."""
        self.add(f"part_rows = part + (of_pair + slot)[:, None] * {part_width(size)}")
        for i, piece in enumerate(pieces(size)):
            mask = conjunction("live[:, None]", validity(piece))
            self.add(f"found = tl.load(part_rows + {entry_numbers(piece)}, mask={mask}, other=0.0)")
            running_sum = f"sum_{i} * rescale[:, None] + weight[:, None] * " if weighted else f"sum_{i} + "
            self.add(f"sum_{i} = {running_sum}found")


@dataclass
class MergeForward(MergeFrame):
    """Emits output and LSE, merged from the partial results of blocks in the order of the blocks."""

    stage: ClassVar[str] = "merge"
    makes: ClassVar[str] = "Output and LSE"

    @override
    def write(self) -> None:
        p, rows = self.problem, self.tiles.q_tile
        self._program("out", p.dv)
        self.pointers("fp32", "part_lse", "lse")
        self.numbers("heads")
        self.add(f'most = tl.full(({rows},), float("-inf"), tl.float32)', f"total = tl.zeros(({rows},), tl.float32)")
        with self.lines.block("for slot in range(0, slots):"):
            self._emit_slot()
            self.add(
                'of_part = tl.load(part_lse + of_pair + slot, mask=live, other=float("-inf"))',
                "before = most",
                "most = tl.maximum(most, of_part)",
                'base = tl.where(most == float("-inf"), 0.0, most)',
                "rescale = tl.exp2(before - base)",
                "weight = tl.exp2(of_part - base)",
                "total = total * rescale + weight",
            )
            self._add_parts(p.dv, weighted=True)
        self.add(
            "# A row that sees nothing gives 0, and an LSE of -inf.", "divisor = tl.where(total > 0.0, total, 1.0)"
        )
        self.scale_sums("sum", p.dv, "(1.0 / divisor)[:, None]")
        self.store_rows("out", p.dv, "there", "sum", p.dtype)
        self.add(
            f'whole = tl.where(total > 0.0, (most + tl.log2(divisor)) * {LN_2}, float("-inf"))',
            "tl.store(lse + (batch * heads + head) * queries + row, whole, mask=there)",
        )


@dataclass
class MergeQueryGradient(MergeFrame):
    """Emits the gradient of q, the sum of the gradients by block."""

    stage: ClassVar[str] = "sum"
    makes: ClassVar[str] = "Gradient of queries"

    @override
    def write(self) -> None:
        p = self.problem
        self._program("dq", p.dk)
        with self.lines.block("for slot in range(0, slots):"):
            self._emit_slot()
            self._add_parts(p.dk, weighted=False)
        self.store_rows("dq", p.dk, "there", "sum", p.dtype)
