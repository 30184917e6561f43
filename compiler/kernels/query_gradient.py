"""The gradient of q, by rows of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from attnc.compiler.kernels.attention_problem import AttentionProblem
from attnc.compiler.kernels.depth import Accumulated, accumulated
from attnc.compiler.kernels.kernel_source import KernelSource
from attnc.compiler.kernels.tiled_kernel import TiledKernel
from attnc.compiler.simulation.gpu_clocks import TileShape


def emit_dq(problem: AttentionProblem, tiles: TileShape) -> KernelSource:
    """The gradient of q, by rows of queries."""
    return QueryGradient(problem, tiles).source()


@dataclass
class QueryGradient(TiledKernel):
    """dq = dS k, where the score's change dS is P ∘ (dO vᵀ - delta) with P = exp(S - LSE).

    Of weights P = W / ΣW, a change of W is (dO vᵀ - delta) / ΣW; of others it is dO vᵀ.
    """

    stage: ClassVar[str] = "dq"
    kept = ("q", "dout", "dq")
    read = ("q", "k", "v", "dout")
    written: ClassVar[tuple[str, ...]] = ("dq",)

    @property
    @override
    def accumulated(self) -> Accumulated:
        return accumulated(self.problem.dk)

    @override
    def start(self) -> None:
        self.lines.add("")
        self.own_rows()
        self.moving("k", "kv_head", self.problem.dk)
        self.moving("v", "kv_head", self.problem.dv)
        self.zero("sum", self.problem.dk)
        self.zero_gradients()

    def own_rows(self) -> None:
        """Load what the program has of its rows."""
        add, p = self.lines.add, self.problem
        self.own("q", "head", p.dk)
        self.own("dout", "head", p.dv)
        if self.rows_of:
            add("of_row = lane.to(tl.int64) * queries + row")
        for name in self.rows_of:
            none = 'float("inf")' if name == "lse" else "0.0"
            add(f"own_{name} = tl.load({name} + of_row, mask=there, other={none})")

    @override
    def tile(self, tile: str, partial: bool) -> None:
        p = self.problem
        self.change(tile, partial)
        self.add_gradients("change", partial)
        change = self.slope("change", partial)
        keys = self.load_sum("k", "kv_head", p.dk, tile, partial, loaded=True)
        for (name, _), key in zip(self.sums("sum", p.dk), keys, strict=True):
            self.add_weighted(name, change, key, partial)

    def change(self, tile: str, partial: bool) -> None:
        """`change`: how the result changes with the scores of a tile."""
        p, of_query = self.problem, {name: f"own_{name}[:, None]" for name in self.rows_of}
        self.load("k", "kv_head", p.dk, tile, partial)
        if self.has_product:
            self.product("q", "k", p.dk, self.product_name)
        if self.problem.kind == "softmax":
            self.weighed(of_query, partial)
        else:
            self.scored(partial, formula=False)
        self.load("v", "kv_head", p.dv, tile, partial)
        self.product("dout", "v", p.dv, "change")
        self.changed(of_query, partial)

    @override
    def finish(self) -> None:
        for name, _ in self.sums("sum", self.problem.dk) if self.shared_factor not in (None, "1.0") else ():
            self.lines.add(f"{name} = {name} * {self.shared_factor}")
        self.store_gradients("queries")
        self.store("dq", "head", self.sums("sum", self.problem.dk), self.problem.dk)
