"""The gradients of k and v, by rows of keys, over all query heads of a kv head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from attnc.compiler.ir import Index, fold
from attnc.compiler.kernels.attention_problem import PAIRS
from attnc.compiler.kernels.depth import LEAST, Accumulated, accumulated
from attnc.compiler.kernels.index_text import COLUMNS, ROWS, ExprText, IndexText
from attnc.compiler.kernels.text_lines import SHIFT
from attnc.compiler.kernels.tiled_kernel import TiledKernel
from attnc.compiler.kernels.walks import ListedWalk, Sides, Walk


def turns_fit(group: int, queries: int) -> bool:
    """Whether the inverse of `SHIFT` bits is exact for turns over `group` heads and `queries`, for any tile shape."""
    tiles = queries // LEAST + 1
    return group * tiles * tiles < 1 << SHIFT


@dataclass
class KeyGradients(TiledKernel):
    """Emits dv = Pᵀ dO and dk = scale * dSᵀ q, with Sᵀ = k qᵀ, so that computed tiles are multiplied untransposed."""

    stage: ClassVar[str] = "dkdv"
    kept = ("k", "v", "dk", "dv")
    read = ("q", "k", "v", "dout")
    written: ClassVar[tuple[str, ...]] = ("dk", "dv")
    numbers_columns = True
    stationary = "key"
    query_lane = "batch * heads + kv_head * group"

    @property
    @override
    def walk(self) -> Walk:
        return self.problem.by_key

    @property
    @override
    def sides(self) -> Sides:
        return Sides("row", "keys", self.tiles.k_tile, "query", "queries", self.tiles.q_tile)

    @property
    @override
    def accumulated(self) -> Accumulated:
        return accumulated(max(self.problem.dk, self.problem.dv))

    @override
    def emit_heads(self) -> None:
        self.lines.add(
            "kv_heads = heads // group", f"batch = {self.batch_text('kv_heads')}", "kv_head = lane % kv_heads"
        )

    @override
    def emit_positions(self) -> None:
        add = self.lines.add
        if self.problem.documents:
            self.emit_windows("keys")
            add("window_first = window_row", "window_last = window_row_end - 1")
            add("place = safe - window_key")
        else:
            add("place = tl.minimum(row, keys - 1)" if self.problem.grid is None else "place = row")

    @override
    def position_offset(self) -> str:
        return " + window_row - window_shift" if self.problem.documents else " - shift"

    @override
    def index_writer(self) -> IndexText:
        wide = ".to(tl.int64)" if self.walk.is_wide else ""
        query = ExprText("(query + shift)", COLUMNS)
        if self.problem.documents:
            query = ExprText("(query[None, :] - (window_row - window_shift)[:, None])", PAIRS)
        names: dict[Index, ExprText] = {
            fold.place("k"): ExprText(f"place{wide}", ROWS),
            fold.place("q"): query,
            **self.size_names(),
        }
        return IndexText(names, self.read_exact, wide_place=fold.place("k") if self.walk.is_wide else None)

    @override
    def padded_names(self) -> dict[Index, ExprText]:
        return {
            fold.place("k"): ExprText("row", ROWS),
            fold.place("q"): ExprText("(tl.minimum(query, queries - 1) + shift)", COLUMNS),
        }

    @override
    def start(self) -> None:
        p = self.problem
        self.lines.add("")
        self.load_own("k", "kv_head", p.dk)
        self.load_own("v", "kv_head", p.dv)
        self.zero("key_sum", p.dk)
        self.zero("value_sum", p.dv)

    @property
    @override
    def sums_pairs(self) -> bool:
        return self.problem.is_nested

    @override
    def emit_loops(self, texts: IndexText) -> None:
        p, walk, lines = self.problem, self.walk, self.lines
        if not walk.reads_head:
            self.begin(texts)
        with lines.block("for member in range(group):") if p.is_nested else nullcontext():
            head = "head = kv_head * group + member" if p.grouped else "head = kv_head"
            head_lines = [head, *self._head_bases()]
            if p.is_nested or not p.grouped:
                lines.add(*head_lines)
            else:
                lines.turns = tuple(head_lines)
            if isinstance(walk, ListedWalk):
                lines.add("entry = tl.load(list_of_lane + batch * heads + head) * (tiles + 1) + row_tile")
            if walk.reads_head:
                self.begin(texts)
            self.steps("q", p.dk)
            self.steps("dout", p.dv)
            self.load_terms(self.stationary, "there", "row", "own")
            self.zero_gradients()
            walk.loops(lines, self.sides, self.body, self.full_loop)
            lines.turns = ()
            self.store_gradients("keys")

    def _head_bases(self) -> Iterator[str]:
        """Yield the lines that compute where a query head's tensors and numbers begin."""
        if not self.problem.boxes:
            yield from (self.head_base(name, "head") for name in ("q", "dout"))
        yield "of_head = (batch * heads + head) * queries.to(tl.int64)"

    @override
    def tile(self, tile: str, partial: bool) -> None:
        p = self.problem
        query_texts = {name: f"{name}_of[None, :]" for name in self.row_numbers}
        self.load("q", "head", p.dk, tile, partial)
        if self.has_product:
            self.product("k", "q", p.dk, self.product_name)
        self._load_query_numbers(self.row_numbers[:1], partial)
        self.recompute_weight(query_texts, partial)
        self.load("dout", "head", p.dv, tile, partial)
        outputs = self.load_sum("dout", "head", p.dv, tile, partial, loaded=True)
        for (name, _), value in zip(self.sums("value_sum", p.dv), outputs, strict=True):
            self.add_weighted(name, "weight", value, partial)
        self._load_query_numbers(self.row_numbers[1:], partial)
        self.product("v", "dout", p.dv, "change")
        self.emit_formula_gradient(query_texts, partial)
        self.add_gradients("change", partial)
        change = self.product_gradient("change", partial)
        queries = self.load_sum("q", "head", p.dk, tile, partial, loaded=True)
        for (name, _), query in zip(self.sums("key_sum", p.dk), queries, strict=True):
            self.add_weighted(name, change, query, partial)

    def _load_query_numbers(self, names: Sequence[str], partial: bool) -> None:
        """Load the numbers `names` of a tile's queries."""
        for name in names:
            none = 'float("inf")' if name == "lse" else "0.0"
            inside = f", mask={self.inside()}, other={none}" if partial else ""
            self.lines.add(f"{name}_of = tl.load({name} + of_head + query{inside})")

    @override
    def finish(self) -> None:
        p = self.problem
        for name, _ in self.sums("key_sum", p.dk) if self.shared_factor not in (None, "1.0") else ():
            self.lines.add(f"{name} = {name} * {self.shared_factor}")
        self.store("dk", "kv_head", self.sums("key_sum", p.dk), p.dk)
        self.store("dv", "kv_head", self.sums("value_sum", p.dv), p.dv)
