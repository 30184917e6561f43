"""The decode kernels of a pattern, which compute its last rows against a cache, for one head shape on one target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attnc.compiler.analysis.token_ranges import ends, find_ranges
from attnc.compiler.ir import Extent, Pattern
from attnc.compiler.ir.rewrite import walk
from attnc.compiler.ir.value_nodes import is_plain
from attnc.compiler.kernels.attention_kernels import (
    HeadShape,
    can_compute_ends,
    exact_parts,
    header_lines,
    read_tensors,
    with_widths,
)
from attnc.compiler.kernels.attention_problem import AttentionProblem
from attnc.compiler.kernels.decode import CacheKind, emit_decode, emit_merge
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.kernel_source import KernelSource, TileShape
from attnc.compiler.kernels.score_formula import find_score
from attnc.compiler.kernels.targets import Target
from attnc.compiler.kernels.visible_products import hides_by_inputs
from attnc.compiler.kernels.walks import ListedWalk, RangedWalk

ROW_TILES = (16, 32, 64)
"""Rows of a program's tile: queries of the heads that share a kv head."""


@dataclass(frozen=True)
class DecodeKernels:
    """The texts of decode kernels. `listed`: the host lists the keys that a row sees, so it must know the lengths."""

    problem: AttentionProblem
    target: Target
    kind: CacheKind
    listed: bool
    reason: str
    hides_by_inputs: bool

    def decode(self, rows: int) -> KernelSource:
        """Return the kernel of partial results, for `rows` rows of a kv head. Raises NotInKernelsError."""
        return _decode(self.problem, self.kind, self.target, row_tile(rows))

    def careful(self, rows: int) -> KernelSource | None:
        """Return the careful kernel that follows `decode` (`visible_products`); None if none is needed."""
        return (
            _decode(self.problem.as_careful, self.kind, self.target, row_tile(rows)) if self.hides_by_inputs else None
        )

    @property
    def merge(self) -> KernelSource:
        """The kernel that merges partial results."""
        p = self.problem
        extra, least = p.score is not None and p.score.extra is not None, p.score is not None and p.score.counts_least
        return _merge(p.name, p.header, p.dv, p.dtype, extra, least)


def row_tile(rows: int) -> int:
    """Return the rows of a program's tile for `rows` rows of a kv head."""
    return next((tile for tile in ROW_TILES if rows <= tile), ROW_TILES[-1])


@lru_cache(maxsize=256)
def _decode(problem: AttentionProblem, kind: CacheKind, target: Target, rows: int) -> KernelSource:
    return emit_decode(problem, _tiles(problem, target, rows), kind)


@lru_cache(maxsize=256)
def _merge(name: str, header: tuple[str, ...], dv: int, dtype: str, extra: bool, least: bool) -> KernelSource:
    return emit_merge(name, header, dv, dtype, extra=extra, least=least)


def _tiles(problem: AttentionProblem, target: Target, rows: int) -> TileShape:
    """Return the tiles: few keys if keys are wide or listed, or if scores load more, as registers hold no more."""
    width, listed = max(problem.dk, problem.dv), isinstance(problem.by_query, ListedWalk)
    if problem.dtype == "float32":
        return TileShape(rows, 32 if width <= 128 else 16, 4, 2)
    loads = problem.score is not None and problem.score.reads_pairs
    narrow = not loads and (width <= 64 or (width <= 128 and rows == ROW_TILES[0] and not listed))
    warps = 8 if rows == ROW_TILES[-1] and width > 64 else 4
    return TileShape(rows, 64 if narrow else 32, warps, 1 if target.name == "gfx942" else 3)


_PASSED_SIZES = {"keys", "heads", "kv_heads", "group", "dk", "dv"}


def find_decode(pattern: Pattern, heads: HeadShape, target: Target, kind: CacheKind) -> DecodeKernels:
    """Return the kernels of a pattern with one attention that `last_rows` returned. Raises NotInKernelsError."""
    node = pattern.attend
    score = None if is_plain(node) else find_score(with_widths(node, heads.widths or (heads.dk, heads.dv)))
    ranges = None if pattern.documents is not None else find_ranges(node.visible, "k")
    listed = ranges is None or not can_compute_ends(ranges)
    roots = [] if listed or ranges is None else list(ends(ranges))
    if score is not None:
        roots += exact_parts(score)
    sizes = {n.name for root in roots for n in walk(root) if isinstance(n, Extent)} - _PASSED_SIZES
    if sizes:
        raise NotInKernelsError(f"decoding with the size `{min(sizes)}`, which may depend on the length of a cache")
    key_walk = ListedWalk(runs=False) if listed or ranges is None else RangedWalk(ranges)
    problem = AttentionProblem(
        name=pattern.name,
        header=header_lines(pattern, node, "lists" if listed else "ranges"),
        by_query=key_walk,
        by_key=key_walk,
        dk=heads.dk,
        dv=heads.dv,
        dtype=heads.dtype,
        tensors=tuple(dict.fromkeys([*read_tensors(roots), *(score.inputs if score else ())])),
        score=score,
        widths=heads.widths or (heads.dk, heads.dv),
        tf32=heads.tf32,
        grouped=heads.grouped,
    )
    reason = "each row sees few ranges of keys: bounds in the kernel, which reads the lengths"
    reason = "the keys that rows see are listed" if listed else reason
    decode_kernels = DecodeKernels(problem, target, kind, listed, reason, hides_by_inputs(pattern))
    decode_kernels.decode(1)
    return decode_kernels
