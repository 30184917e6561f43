"""Decode kernels, for a few queries against a cache: programs share out the keys, and a second kernel merges.

The query heads that share a kv head form the rows of one tile, so that each key is loaded once for all of these heads.
Only keys that some row sees are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from typing_extensions import override

from attnc.compiler.ir import Extent, Index, Position, fold
from attnc.compiler.ir.value_nodes import reads
from attnc.compiler.kernels.attention_problem import AttentionProblem
from attnc.compiler.kernels.depth import DepthSlice, pieces
from attnc.compiler.kernels.forward import Forward
from attnc.compiler.kernels.index_text import ROWS, ExprText, NotInKernelsError
from attnc.compiler.kernels.inputs import input_name, size_name, strides
from attnc.compiler.kernels.kernel_source import (
    BYTES,
    POINTED,
    TYPES,
    VECTOR,
    KernelArgument,
    KernelSource,
    TileShape,
    declaration,
    preface,
    stride_arguments,
    typed_arguments,
)
from attnc.compiler.kernels.loads import conjunction, entry_numbers, validity
from attnc.compiler.kernels.score_formula import LEAST, ScoreFormula, Term
from attnc.compiler.kernels.text_lines import Lines
from attnc.compiler.kernels.value_text import LN_2, LOG2_E
from attnc.compiler.kernels.visible_products import RESULT_SUM
from attnc.compiler.kernels.walks import RangedWalk

CacheKind = Literal["slots", "pages", "ring"]

MOST_SPLITS = 256
"""Maximum number of splits of a lane's keys, each of which gives a partial result."""


def emit_decode(problem: AttentionProblem, tiles: TileShape, kind: CacheKind) -> KernelSource:
    """Emit the kernel of partial results: `out_parts` (splits, B, Hq, Nq, dv), `lse_parts` (splits, B, Hq, Nq), fp32.

    Raises NotInKernelsError if the kernel cannot compute the problem.
    """
    if problem.kind != "softmax":
        raise NotInKernelsError("decoding with weights that are not a softmax")
    if problem.score is not None:
        _check(problem.score)
    if problem.dv > 256:
        raise NotInKernelsError("decoding with values wider than 256")
    return Decode(problem, tiles, kind=kind).source()


def _check(score: ScoreFormula) -> None:
    """Raise NotInKernelsError if the score needs vectors or terms of all tokens, computed before every step."""
    if score.query or score.key or score.value is not None:
        raise NotInKernelsError("decoding with vectors that the pattern computes")
    for term in (*score.terms, *([] if score.extra is None else [score.extra])):
        lengths = any(isinstance(n, Position | Extent) and n.name in _LENGTHS for n in term.value.below)
        if term.side != "query" or lengths or {"q", "k"} & reads(term.value):
            raise NotInKernelsError("decoding with terms that differ from token to token")


_LENGTHS = ("q", "k", "keys", "queries")


@dataclass
class Decode(Forward):
    """Emits the partial results of one split of a lane's keys; a lane is a batch entry and a kv head."""

    kind: CacheKind = field(kw_only=True)

    stage: ClassVar[str] = "decode"
    written: ClassVar[tuple[str, ...]] = ()

    @property
    @override
    def makes(self) -> str:
        return "A share of output and LSE"

    @property
    @override
    def row_numbers(self) -> tuple[str, ...]:
        return ()

    @property
    def _is_listed(self) -> bool:
        return not isinstance(self.walk, RangedWalk)

    # --- arguments

    @override
    def read_terms(self) -> list[Term]:
        """Return the terms without the extra logit, which the merging kernel adds."""
        return [] if self.problem.score is None else list(self.problem.score.terms)

    @override
    def _arguments(self) -> tuple[KernelArgument, ...]:
        p = self.problem
        arguments = typed_arguments(f"*{TYPES[p.dtype]}", *self.read)
        arguments += [KernelArgument("kv_len", "*i32"), *typed_arguments("*fp32", "out_parts", "lse_parts")]
        arguments += [RESULT_SUM] if p.careful else []
        if self.kind == "pages":
            arguments.append(KernelArgument("block_table", "*i32"))
        arguments += [KernelArgument(input_name(tensor), f"*{POINTED[tensor.kind]}") for tensor in p.tensors]
        if self._is_listed:
            arguments += typed_arguments("*i32", "listed_pointers", "listed_keys", "listed_rows")
        terms = self.read_terms()
        arguments += typed_arguments("*fp32", *(term.tensor.name for term in terms))
        arguments += [argument for name in self.read for argument in stride_arguments(name)]
        arguments += [
            KernelArgument(f"{input_name(tensor)}_{i}", "i64") for tensor in p.tensors for i in strides(tensor)
        ]
        arguments += [KernelArgument(f"{term.tensor.name}_{i}", "i64") for term in terms for i in range(2)]
        slot_sizes = {"slots": (), "pages": ("page_bits", "columns"), "ring": ("ring_first", "ring_slots")}[self.kind]
        list_sizes = ("listed_words",) if self._is_listed else ()
        counts = (*_COUNTS, *slot_sizes, *list_sizes, *map(size_name, p.sizes))
        return (*arguments, *typed_arguments("i32", *counts), KernelArgument("scale", "fp32"))

    # --- positions

    @override
    def emit_program(self) -> None:
        add, sides = self.lines.add, self.sides
        add(
            "# This program: a share of the keys of one lane, and a tile of its rows: queries of heads that share keys."
        )
        add("lane = tl.program_id(0) % lanes", "split = tl.program_id(0) // lanes")
        add("batch = (lane // kv_heads).to(tl.int64)", "kv_head = lane % kv_heads", "keys = tl.load(kv_len + batch)")
        add(f"inner = tl.program_id(1) * {sides.row_tile} + tl.arange(0, {sides.row_tile})")
        add("there = inner < group * queries", "inner = tl.minimum(inner, group * queries - 1)")
        add("member = inner // queries", "head = kv_head * group + member", "row = inner - member * queries")
        add("shift = keys - queries", "query = row + shift", f"column = tl.arange(0, {sides.column_tile})")

    @override
    def size_names(self) -> dict[Index, ExprText]:
        return {**super().size_names(), fold.head_index("head"): ExprText("head", ROWS)}

    # --- loads

    @override
    def start(self) -> None:
        add, p, unit = self.lines.add, self.problem, self.problem.vector
        add("", f"q_rows = q + (batch * q_batch + head * q_head + row * q_token)[:, None] * {unit}")
        for i, piece in enumerate(pieces(p.dk)):
            mask = conjunction("there[:, None]", validity(piece))
            add(f"q_{i} = tl.load(q_rows + {entry_numbers(piece)}, mask={mask}, other=0.0)")
        for name in ("k", "v"):
            paged = self.kind == "pages"
            add(f"{name}_base = {name} + ({'' if paged else f'batch * {name}_batch + '}kv_head * {name}_head) * {unit}")
        add(f'most = tl.full(({self.sides.row_tile},), float("-inf"), tl.float32)')
        add(f"total = tl.zeros(({self.sides.row_tile},), tl.float32)")
        self.zero("sum", p.dv)

    @override
    def load(self, name: str, head: str, size: int, tile: str, partial: bool) -> None:
        page = f"page * {name}_batch + " if self.kind == "pages" else ""
        rows = f"({page}slot * {name}_token)[:, None] * {self.problem.vector}"
        for i, piece in enumerate(pieces(size)):
            mask = conjunction("seen[:, None]", validity(piece))
            where = f"{name}_base + {rows} + {entry_numbers(piece)}"
            self.lines.add(f"{name}_{i} = tl.load({where}, mask={mask}, other=0.0)")

    @override
    def inside(self) -> str:
        return "seen"

    def _slots(self) -> None:
        """Emit the cache slots of those keys of a tile that some row sees."""
        add = self.lines.add
        add("seen = tl.max(tl.where(visible & there[:, None], 1, 0), 0) > 0")
        if self.kind == "slots":
            add("slot = key.to(tl.int64)")
        elif self.kind == "ring":
            add("turned = ring_first + (key - ring_first) % (ring_slots - ring_first)")
            add("slot = tl.where(key < ring_first, key, turned).to(tl.int64)")
        else:
            add("page = tl.load(block_table + batch * columns + (key >> page_bits), mask=seen, other=0).to(tl.int64)")
            add("slot = (key & ((1 << page_bits) - 1)).to(tl.int64)")

    # --- loops

    @override
    def begin(self, texts: object) -> None:
        if not self._is_listed:
            super().begin(self.texts)
            return
        self.lines.add(
            "",
            "# The keys that some row sees are listed.",
            "listed_begin = tl.load(listed_pointers + lane)",
            "listed_end = tl.load(listed_pointers + lane + 1)",
            "",
        )

    @override
    def emit_loops(self, texts: object) -> None:
        self.begin(texts)
        add, size = self.lines.add, self.sides.column_tile
        if self._is_listed:
            add(f"count = (listed_end - listed_begin + {size - 1}) // {size}")
            with self.lines.block("for tile in range(count * split // splits, count * (split + 1) // splits):"):
                add(f"at = listed_begin + tile * {size} + column", "here = at < listed_end")
                add("key = tl.load(listed_keys + at, mask=here, other=0)")
                add("own = tl.where(listed_words > 1, member, 0)")
                add("words = listed_rows + at[None, :] * listed_words + own[:, None]")
                add("visible = ((tl.load(words, mask=here[None, :], other=0) >> row[:, None]) & 1) != 0")
                self._tile()
            return
        walk = self.walk
        assert isinstance(walk, RangedWalk)
        add("end = 0")
        for i, token_range in enumerate(walk.ranges):
            low = f"low_{i}" if token_range.low is not None or len(walk.ranges) > 1 else "0"
            add(f"begin = tl.maximum({low}, end)", f"end = tl.maximum(high_{i}, begin)", "count = end - begin")
            with self.lines.block(
                "for tile in range(begin + count * split // splits, begin + count * (split + 1) // splits):"
            ):
                self.column_numbers("tile")
                walk.visible(self.lines, self.sides, self.texts)
                self._tile()

    def _tile(self) -> None:
        self.is_partial = True
        self._slots()
        self.tile("tile", True)

    # --- results

    @override
    def finish(self) -> None:
        add, p = self.lines.add, self.problem
        add("# A row that sees nothing of this share gives 0, and an LSE of -inf.")
        add("whole = tl.where(total > 0.0, total, 1.0)")
        add("batches = lanes // kv_heads", "place = ((split * batches + batch) * heads + head) * queries + row")
        for name, piece in self.sums("sum", p.dv):
            mask = conjunction("there[:, None]", validity(piece))
            where = f"out_parts + place[:, None] * {p.dv} + {entry_numbers(piece)}"
            add(f"tl.store({where}, {name} / whole[:, None], mask={mask})")
        add(f'found = tl.where(total > 0.0, (most + tl.log2(whole)) * {LN_2}, float("-inf"))')
        add("tl.store(lse_parts + place, found, mask=there)")


_COUNTS = ("lanes", "heads", "kv_heads", "group", "queries", "splits")


def emit_merge(name: str, header: Sequence[str], dv: int, dtype: str, *, extra: bool, least: bool) -> KernelSource:
    """Emit the kernel that merges partial results into `out` (B, Hq, Nq, dv) and `lse`, one row per program.

    `extra`: every row has an extra logit, `of_extra` (B or 1, Hq or 1, Nq). `least`: scores may be -inf, so that
    partial results of such scores alone have an LSE of about `LEAST`.
    """
    pointers = [*typed_arguments("*fp32", "out_parts", "lse_parts"), KernelArgument("out", f"*{TYPES[dtype]}")]
    pointers += typed_arguments("*fp32", "lse", *(["of_extra"] if extra else []))
    numbers = [*stride_arguments("out"), *typed_arguments("i64", *(["of_extra_0", "of_extra_1"] if extra else []))]
    numbers += typed_arguments("i32", "rows", "heads", "queries", "splits")
    function = f"{name}_merge"
    lines = Lines()
    about = f"Shares of output and LSE merged. Heads of {dv} in {dtype}, a row each program."
    lines.add(*preface(*header, about))
    lines.add(*declaration(function, (*pointers, *numbers)))
    lines.depth = 1
    unit = VECTOR // BYTES[dtype]
    lines.add(
        "place = tl.program_id(0).to(tl.int64)",
        "row = place % queries",
        "head = place // queries % heads",
        "batch = place // queries // heads",
        f"split = tl.arange(0, {MOST_SPLITS})",
        'own = tl.load(lse_parts + split * rows.to(tl.int64) + place, mask=split < splits, other=float("-inf"))',
        "most = tl.max(own, 0)",
    )
    if extra:
        lines.add(
            "logit = tl.load(of_extra + batch * of_extra_0 + head * of_extra_1 + row)",
            "# The extra logit takes its share of what the row sees.",
            'most = tl.where(most > float("-inf"), tl.maximum(most, logit), most)',
        )
    lines.add('base = tl.where(most > float("-inf"), most, 0.0)')
    if least:
        lines.add(f'own = tl.where(own > {0.9 * LEAST!r}, own, float("-inf"))')
    lines.add(f"whole = tl.sum(tl.exp2((own - base) * {LOG2_E!r}), 0)")
    if extra:
        counted = f'most > float("-inf"), whole + tl.exp2((logit - base) * {LOG2_E!r}), whole'
        lines.add(f"whole = tl.where({counted})")
    depth_slices = pieces(dv)
    for i, piece in enumerate(depth_slices):
        lines.add(f"sum_{i} = tl.zeros(({piece.width},), tl.float32)")
    with lines.block("for i in range(splits):"):
        lines.add("where = i * rows.to(tl.int64) + place")
        lines.add(f"weight = tl.exp2((tl.load(lse_parts + where) - base) * {LOG2_E!r})")
        if least:
            lines.add(f"weight = tl.where(tl.load(lse_parts + where) > {0.9 * LEAST!r}, weight, 0.0)")
        for i, piece in enumerate(depth_slices):
            lines.add(
                f"sum_{i} += weight * tl.load(out_parts + where * {dv} + {_entry_offsets(piece)}{_masked(piece, True)})"
            )
    lines.add("divisor = tl.where(whole > 0.0, whole, 1.0)")
    lines.add(f"at = out + (batch * out_batch + head * out_head + row * out_token) * {unit}")
    for i, piece in enumerate(depth_slices):
        value = f"(sum_{i} / divisor).to(tl.{dtype})"
        lines.add(f"tl.store(at + {_entry_offsets(piece)}, {value}{_masked(piece, False)})")
    lines.add(f'tl.store(lse + place, tl.where(whole > 0.0, base + tl.log2(divisor) * {LN_2}, float("-inf")))')
    tiles = TileShape(1, max(piece.width for piece in depth_slices), 4, 1)
    return KernelSource("merge", function, str(lines), (*pointers, *numbers), tiles)


def _entry_offsets(piece: DepthSlice) -> str:
    start = f"{piece.start} + " if piece.start else ""
    return f"({start}tl.arange(0, {piece.width}))" if start else f"tl.arange(0, {piece.width})"


def _masked(piece: DepthSlice, loads: bool) -> str:
    if not piece.is_padded:
        return ""
    return f", mask=tl.arange(0, {piece.width}) < {piece.valid}" + (", other=0.0" if loads else "")
