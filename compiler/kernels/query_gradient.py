"""The gradient of q, by rows of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from attnc.compiler.kernels.depth import Accumulated, accumulated
from attnc.compiler.kernels.tiled_kernel import TiledKernel


@dataclass
class QueryGradient(TiledKernel):
    """Emits dq = dS k, where the score's gradient dS is P ∘ (dO vᵀ - delta) with P = exp(S - LSE).

    For weights P = W / ΣW, the gradient of W is (dO vᵀ - delta) / ΣW; for weights that are not divided, it is dO vᵀ.
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
        self.load_rows()
        self.emit_tile_addresses("k", "kv_head", self.problem.dk)
        self.emit_tile_addresses("v", "kv_head", self.problem.dv)
        self.zero("sum", self.problem.dk)
        self.zero_gradients()

    def load_rows(self) -> None:
        """Emit the loads of the program's own rows and of their numbers."""
        add, p = self.lines.add, self.problem
        self.load_own("q", "head", p.dk)
        self.load_own("dout", "head", p.dv)
        if self.row_numbers:
            add("of_row = lane.to(tl.int64) * queries + row")
        for name in self.row_numbers:
            none = 'float("inf")' if name == "lse" else "0.0"
            add(f"own_{name} = tl.load({name} + of_row, mask=there, other={none})")

    @override
    def tile(self, tile: str, partial: bool) -> None:
        p = self.problem
        self.emit_score_gradient(tile, partial)
        self.add_gradients("change", partial)
        change = self.product_gradient("change", partial)
        keys = self.load_sum("k", "kv_head", p.dk, tile, partial, loaded=True)
        for (name, _), key in zip(self.sums("sum", p.dk), keys, strict=True):
            self.add_weighted(name, change, key, partial)

    def emit_score_gradient(self, tile: str, partial: bool) -> None:
        """Emit `change`, the gradient of a tile's scores."""
        p, query_texts = self.problem, {name: f"own_{name}[:, None]" for name in self.row_numbers}
        self.load("k", "kv_head", p.dk, tile, partial)
        if self.has_product:
            self.product("q", "k", p.dk, self.product_name)
        if self.problem.kind == "softmax":
            self.recompute_weight(query_texts, partial)
        else:
            self.emit_score(partial, formula=False)
        self.load("v", "kv_head", p.dv, tile, partial)
        self.product("dout", "v", p.dv, "change")
        self.emit_formula_gradient(query_texts, partial)

    @override
    def finish(self) -> None:
        for name, _ in self.sums("sum", self.problem.dk) if self.shared_factor not in (None, "1.0") else ():
            self.lines.add(f"{name} = {name} * {self.shared_factor}")
        self.store_gradients("queries")
        self.store("dq", "head", self.sums("sum", self.problem.dk), self.problem.dk)
