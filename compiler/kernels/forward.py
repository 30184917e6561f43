"""The forward kernels: the output, and the LSE or the sum of the weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from attnc.compiler.kernels.attention_problem import AttentionProblem
from attnc.compiler.kernels.depth import Accumulated, accumulated
from attnc.compiler.kernels.kernel_source import KernelSource, TileShape
from attnc.compiler.kernels.score_formula import LEAST, Term
from attnc.compiler.kernels.tiled_kernel import TiledKernel
from attnc.compiler.kernels.value_text import LN_2, LOG2_E
from attnc.compiler.kernels.walks import RangedWalk


def emit_forward(problem: AttentionProblem, tiles: TileShape) -> KernelSource:
    """Emit the forward kernel of `out` and the LSE, or the sum of the weights if they are divided by it."""
    kernel_class = Forward if problem.kind == "softmax" else Weighed
    return kernel_class(problem, tiles).source()


@dataclass
class Forward(TiledKernel):
    """Emits softmax(scale * q kᵀ) v, tile by tile, with the running maximum and sum of every row."""

    stage: ClassVar[str] = "forward"
    kept = ("q", "out")
    written: ClassVar[tuple[str, ...]] = ("out",)

    @property
    @override
    def row_numbers(self) -> tuple[str, ...]:
        return ("lse",)

    @property
    @override
    def accumulated(self) -> Accumulated:
        return accumulated(self.problem.dv)

    @property
    @override
    def is_guarded(self) -> bool:
        return self.problem.guarded and self.problem.score is not None and not self.problem.delayed

    @property
    @override
    def is_specialised(self) -> bool:
        """Whether warps have separate tasks: for plain scores of narrow heads with loop bounds, which do not spill."""
        p = self.problem
        return p.specialised and p.score is None and max(p.dk, p.dv) <= 64 and isinstance(p.by_query, RangedWalk)

    @override
    def start(self) -> None:
        add, p = self.lines.add, self.problem
        add("")
        self.load_own("q", "head", p.dk)
        self.emit_tile_addresses("k", "kv_head", p.dk)
        self.emit_tile_addresses("v", "kv_head", p.dv)
        add(f'most = tl.full(({self.sides.row_tile},), float("-inf"), tl.float32)')
        add(f"total = tl.zeros(({self.sides.row_tile},), tl.float32)")
        self.zero("sum", p.dv)

    @override
    def tile(self, tile: str, partial: bool) -> None:
        self.emit_products(tile, partial)
        self.emit_weights(partial)
        self.add_to_total()
        values = self.load_sum("v", "kv_head", self.problem.dv, tile, partial, loaded=False)
        for (name, _), value in zip(self.sums("sum", self.problem.dv), values, strict=True):
            self.rescale(name)
            self.add_weighted(name, "weight", value, partial)

    @override
    def full_loop(self, begin: str, end: str) -> None:
        if not self.problem.delayed or self.accumulated.parts > 1:
            super().full_loop(begin, end)
            return
        add = self.lines.add
        add("# The weights of a tile are multiplied with its values while the next tile's are computed.")
        with self.lines.block(f"if {begin} < {end}:"):
            self._column_numbers(begin)
            self.emit_products(begin, False)
            self.emit_weights(False)
            self._keep_weights()
            with self.lines.block(f"for tile in range({begin} + 1, {end}):"):
                self._column_numbers("tile")
                self.emit_products("tile", False)
                self._add_values("tile - 1")
                self.emit_weights(False)
                self._keep_weights()
            self._add_values(f"{end} - 1")

    def _column_numbers(self, tile: str) -> None:
        """Emit the columns' numbers and terms, if the score reads them."""
        if self.problem.score is not None:
            self.column_numbers(tile)
            self.moving_terms(False)

    def _keep_weights(self) -> None:
        """Emit what keeps the weights of a tile for the next iteration."""
        self.add_to_total()
        self.lines.add(f"kept = weight.to(tl.{self.problem.dtype})")
        for name, _ in self.sums("sum", self.problem.dv):
            self.rescale(name)

    def add_to_total(self) -> None:
        """Emit the addition of a tile to the sum of the weights."""
        self.lines.add("total = total * rescale + tl.sum(weight, 1)")

    def rescale(self, name: str) -> None:
        """Emit the rescaling of a running sum to the new maximum."""
        self.lines.add(f"{name} = {name} * rescale[:, None]")

    def _add_values(self, tile: str) -> None:
        """Emit the product of the kept weights with the values of their tile."""
        values = self.load_sum("v", "kv_head", self.problem.dv, f"({tile})", False, loaded=False)
        for (name, _), value in zip(self.sums("sum", self.problem.dv), values, strict=True):
            self.lines.add(f"{name} = tl.dot(kept, {value}, {name}{self.problem.precision})")

    def emit_products(self, tile: str, partial: bool) -> None:
        """Emit the products of a tile."""
        if self.has_product:
            self.load("k", "kv_head", self.problem.dk, tile, partial)
            self.product("q", "k", self.problem.dk, self.product_name)

    def emit_weights(self, partial: bool) -> None:
        """Emit the weights of a tile from its products, relative to the largest score so far."""
        add, p = self.lines.add, self.problem
        self.emit_score(partial)
        if p.score is not None and p.score.counts_least:
            add("# Finite, so that the extra logit has the row of a key with a score of -inf.")
            add(f'score = tl.where(score == float("-inf"), {LEAST!r}, score)')
        if partial:
            add('score = tl.where(visible, score, float("-inf"))')
        add("before = most", f"most = tl.maximum(most, tl.max(score, 1) * {self.factor})")
        base = "most"
        if partial or p.score is not None:
            add('base = tl.where(most == float("-inf"), 0.0, most)')
            base = "base"
        add(f"weight = tl.exp2(score * {self.factor} - {base}[:, None])", f"rescale = tl.exp2(before - {base})")

    @override
    def finish(self) -> None:
        add, p = self.lines.add, self.problem
        if p.score is not None and p.score.extra is not None:
            self._count_extra()
        add("# A row that sees nothing gives 0, and an LSE of -inf.")
        add("whole = tl.where(total > 0.0, total, 1.0)")
        for name, _ in self.sums("sum", p.dv):
            add(f"{name} = {name} / whole[:, None]")
        self.store("out", "head", self.sums("sum", p.dv), p.dv)
        add(f'found = tl.where(total > 0.0, (most + tl.log2(whole)) * {LN_2}, float("-inf"))')
        store = "tl.store(lse + lane.to(tl.int64) * queries + row, found, mask=there)"
        if self.accumulated.parts > 1:
            with self.lines.block("if part == 0:"):
                add(store)
        else:
            add(store)

    @override
    def read_terms(self) -> list[Term]:
        extra = None if self.problem.score is None else self.problem.score.extra
        return [*super().read_terms(), *([] if extra is None else [extra])]

    @override
    def gradients(self) -> list[str]:
        return []

    def _count_extra(self) -> None:
        """Emit the addition of the extra logit to the softmax of rows that see a key."""
        self.lines.add(
            "# The extra logit takes its share of what a row sees.",
            f"logit = of_extra_own * {LOG2_E!r}",
            "before = most",
            "most = tl.where(total > 0.0, tl.maximum(most, logit), most)",
            'base = tl.where(most == float("-inf"), 0.0, most)',
            "rescale = tl.exp2(before - base)",
        )
        score = self.problem.score
        if score is not None and score.counts_least:
            self.lines.add(f"rescale = tl.where(before > {LEAST!r}, rescale, 0.0)")
        self.lines.add("total = tl.where(total > 0.0, total * rescale + tl.exp2(logit - base), total)")
        for name, _ in self.sums("sum", self.problem.dv):
            self.lines.add(f"{name} = {name} * rescale[:, None]")


@dataclass
class Weighed(Forward):
    """Emits W v with weights W that a formula computes, divided by their sum if `kind` is `share`."""

    @property
    @override
    def makes(self) -> str:
        return "Output and the sums of weights" if self.problem.kind == "share" else "Output"

    @property
    @override
    def row_numbers(self) -> tuple[str, ...]:
        return ("total",) if self.problem.kind == "share" else ()

    @override
    def start(self) -> None:
        p = self.problem
        self.lines.add("")
        if self.has_product:
            self.load_own("q", "head", p.dk)
            self.emit_tile_addresses("k", "kv_head", p.dk)
        self.emit_tile_addresses("v", "kv_head", p.dv)
        if self.problem.kind == "share":
            self.lines.add(f"whole = tl.zeros(({self.sides.row_tile},), tl.float32)")
        self.zero("sum", p.dv)

    @override
    def emit_weights(self, partial: bool) -> None:
        self.emit_score(partial)
        self.lines.add("weight = tl.where(visible, score, 0.0)" if partial else "weight = score")

    @override
    def add_to_total(self) -> None:
        if self.problem.kind == "share":
            self.lines.add("whole += tl.sum(weight, 1)")

    @override
    def rescale(self, name: str) -> None:
        """Emit nothing: sums have no maximum to be rescaled to."""

    @override
    def finish(self) -> None:
        add, p = self.lines.add, self.problem
        if self.problem.kind == "share":
            add("# Shares of nothing are 0.", "divisor = tl.where(whole == 0.0, 1.0, whole)")
            for name, _ in self.sums("sum", p.dv):
                add(f"{name} = {name} / divisor[:, None]")
        self.store("out", "head", self.sums("sum", p.dv), p.dv)
        if self.problem.kind == "share":
            with self.lines.block("if part == 0:") if self.accumulated.parts > 1 else nullcontext():
                add("tl.store(total + lane.to(tl.int64) * queries + row, whole, mask=there)")
