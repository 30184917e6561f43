"""The kernels of one attention for one head shape on one target: their walks and their texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from attnc.compiler.analysis.token_ranges import ends, find_ranges
from attnc.compiler.ir import (
    VALUES,
    Arith,
    Attend,
    Extent,
    HeadIndex,
    Index,
    Lookup,
    Pattern,
    Position,
    Softmax,
    Tensor,
    fold,
)
from attnc.compiler.ir.print_ir import print_index
from attnc.compiler.ir.rewrite import substitute_value, walk
from attnc.compiler.ir.value_nodes import is_plain
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.kernels.attention_problem import AttentionProblem
from attnc.compiler.kernels.brick_ranges import Bricked, find_bricked
from attnc.compiler.kernels.content_masks import MaskTiles, find_mask_relation, gathers_pairs
from attnc.compiler.kernels.delta import emit_delta
from attnc.compiler.kernels.forward import emit_forward
from attnc.compiler.kernels.index_text import NotInKernelsError, is_kernel_operation
from attnc.compiler.kernels.kernel_source import KernelSource, Stage, TileShape
from attnc.compiler.kernels.key_gradients import KeyGradients
from attnc.compiler.kernels.pair_gradients import emit_distance_gradient, emit_table_gradient
from attnc.compiler.kernels.query_gradient import QueryGradient
from attnc.compiler.kernels.score_formula import ScoreFormula, find_score
from attnc.compiler.kernels.targets import Target
from attnc.compiler.kernels.tile_shapes import Load, tile_shape
from attnc.compiler.kernels.visible_products import hides_by_inputs
from attnc.compiler.kernels.walks import Form, ListedWalk, RangedWalk, Walk
from attnc.compiler.passes.attentions import content_masks
from attnc.compiler.passes.before_keys import needs_rows_from_0

Tiles = Mapping[Stage, TileShape]

FIXED = ("queries", "keys", "heads", "kv_heads", "group")
"""Sizes that every kernel receives as arguments."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The shape of a head: widths and dtype of the multiplied vectors, and for fp32 whether products may use TF32.

    `widths`: dk and dv of the call, if the multiplied vectors are computed from those of the call. `grouped`: query
    heads may share a kv head; kernels of key gradients then walk all query heads of a group.
    """

    dk: int
    dv: int
    dtype: str
    tf32: bool = False
    widths: tuple[int, int] | None = None
    grouped: bool = True


@dataclass(frozen=True)
class AttentionKernels:
    """The kernel texts of one attention, each made on first use. `form`: how live tiles are found; `reason`: why so.

    `tiles`: tile shapes of the stages that do not take the first choice. `hides_by_inputs`: the contents of a call's
    inputs decide which pairs are hidden.
    """

    problem: AttentionProblem
    target: Target
    form: Form
    reason: str
    bricked: Mapping[Stage, Bricked] = field(default_factory=dict)
    tiles: Tiles = field(default_factory=dict)
    hides_by_inputs: bool = False

    @cached_property
    def careful(self) -> AttentionKernels | None:
        """The careful kernels that follow forward, dq and dkdv (`visible_products`); None if none are needed."""
        return replace(self, problem=self.problem.as_careful) if self.hides_by_inputs else None

    def listed(self, stage: Stage, runs: bool) -> KernelSource:
        """Return the kernel of a stage that walks lists of tiles, or lists of runs of tiles."""
        return self._by_runs[stage] if runs else {"forward": self.forward, "dq": self.dq, "dkdv": self.dkdv}[stage]

    @cached_property
    def _by_runs(self) -> dict[Stage, KernelSource]:
        problem = replace(self.problem, by_query=ListedWalk(runs=True), by_key=ListedWalk(runs=True))
        kernels = replace(self, problem=problem)
        return {"forward": kernels.forward, "dq": kernels.dq, "dkdv": kernels.dkdv}

    @cached_property
    def forward(self) -> KernelSource:
        """The kernel of the output and the LSE."""
        return emit_forward(self._problem("forward"), self._tiles("forward"))

    @cached_property
    def dq(self) -> KernelSource:
        """The kernel of the gradient of q."""
        return QueryGradient(self._problem("dq"), self._tiles("dq")).source()

    @cached_property
    def dkdv(self) -> KernelSource:
        """The kernel of the gradients of k and v."""
        return KeyGradients(self._problem("dkdv"), self._tiles("dkdv")).source()

    @cached_property
    def delta(self) -> KernelSource:
        """The kernel that prepares the backward."""
        return emit_delta(self.problem, lse_gradient=False)

    @cached_property
    def delta_with_lse(self) -> KernelSource:
        """The kernel that prepares the backward if the LSE has a gradient."""
        return emit_delta(self.problem, lse_gradient=True)

    @cached_property
    def of_distances(self) -> dict[str, KernelSource]:
        """The kernels for gradients of terms by distance, by name. Raises NotInKernelsError."""
        score, tiles = self.problem.score, self._tiles("pairs")
        terms = [term for term in (score.terms if score else ()) if term.side == "distance" and term.varies]
        return {term.tensor.name: emit_distance_gradient(self.problem, term, tiles) for term in terms}

    @cached_property
    def of_tables(self) -> dict[str, KernelSource]:
        """The kernels for gradients of inputs that are read pair by pair, by name. Raises NotInKernelsError."""
        score, tiles = self.problem.score, self._tiles("pairs")
        tensors = score.inputs if score else ()
        return {tensor.name: emit_table_gradient(self.problem, tensor, tiles) for tensor in tensors}

    def check_gradients(self, tables: Sequence[str]) -> None:
        """Raise NotInKernelsError if the gradients of terms, or of the inputs `tables`, have no kernels."""
        kernels = {**self.of_distances, **(self.of_tables if tables else {})}
        assert all(name in kernels for name in tables)

    def _problem(self, stage: Stage) -> AttentionProblem:
        """Return the problem with the bricks of a stage."""
        bricked = self.bricked.get(stage)
        if bricked is None:
            return self.problem
        return replace(self.problem, grid=bricked.grid, by_query=bricked.by_query, by_key=bricked.by_key, delayed=False)

    def _tiles(self, stage: Stage) -> TileShape:
        """Return a stage's tiles; careful kernels load nothing ahead, so that their products find shared memory."""
        shape = self._usual_tiles(stage)
        return replace(shape, stages=1) if self.problem.careful else shape

    def _usual_tiles(self, stage: Stage) -> TileShape:
        if stage in self.tiles:
            return self.tiles[stage]
        p = self.problem
        problem = self._problem(stage)
        walk = problem.by_key if stage == "dkdv" else problem.by_query
        conditions = {"nested": p.is_nested, "inner": walk.has_inner_loops}
        if isinstance(walk, MaskTiles):
            conditions |= {"content": True, "gathered": gathers_pairs(walk.mask_relation)}
        return tile_shape(self.target, stage, p.dk, p.dv, p.dtype, load_of(p.score), **conditions)

    @property
    def of_rows(self) -> tuple[KernelSource, ...]:
        """The kernels that walk rows of queries or keys, in launch order."""
        return self.forward, *([] if self.problem.kind == "sum" else [self.delta]), self.dq, self.dkdv

    @property
    def of_pairs(self) -> tuple[KernelSource, ...]:
        """The kernels of gradients that are summed pair by pair. Raises NotInKernelsError."""
        return *self.of_distances.values(), *self.of_tables.values()

    @property
    def sources(self) -> dict[str, str]:
        """The texts of all kernels, by function name."""
        return {source.function: source.text for source in (*self.of_rows, *self.of_pairs)}


def find_kernels(
    pattern: Pattern,
    heads: HeadShape,
    target: Target,
    square: bool = True,
    on_host: str | None = None,
    tiles: Tiles | None = None,
    before: bool = False,
) -> AttentionKernels:
    """Return the kernels of a pattern with one attention; `square`: calls have as many queries as keys.

    `on_host`: why tile lists must be made on the host. `tiles`: tile shapes that replace the first choice of a stage.
    `before`: queries stand before key 0, so that texts may not assume their positions to be numbers from 0 on. Raises
    NotInKernelsError if there are no kernels for the pattern.
    """
    node = pattern.attend
    score = None if is_plain(node) else find_score(with_widths(node, heads.widths or (heads.dk, heads.dv)))
    head_shape = heads.dk, heads.dv, heads.dtype, load_of(score)
    nested = heads.grouped and score is not None and score.has_terms_of_keys  # all heads share the bricks
    shapes = {stage: tile_shape(target, stage, *head_shape, nested=nested, inner=True) for stage in BRICKED}
    tile_overrides = dict(tiles or {})
    shapes |= {stage: shape for stage, shape in tile_overrides.items() if stage in shapes}
    bricked = _bricks(pattern, node, shapes) if square else None
    if bricked is None:
        form, by_query, by_key, reason = _walks(pattern, node, on_host, before)
        bricks_roots: list[Index] = []
    else:
        grid, by_query, by_key = (bricked["forward"].grid, bricked["forward"].by_query, bricked["forward"].by_key)
        form, reason = "bricks", f"each row sees a range along every axis: {grid}, bounds in the kernel"
        bricks_roots = [*grid.extents, *(e for r in (*by_query.products, *by_key.products) for e in ends(r))]
    range_walks = [range_walk for range_walk in (by_query, by_key) if isinstance(range_walk, RangedWalk)]
    roots = [*(end for range_walk in range_walks for end in ends(range_walk.ranges)), *bricks_roots]
    if isinstance(by_query, MaskTiles):
        roots.append(by_query.mask_relation.relation)
    if score is not None:
        if score.counts_keys and (form != "ranges" or _reads_selections(pattern)):
            raise NotInKernelsError("counts of keys, unless each row sees a few ranges of keys")
        roots += exact_parts(score)
        if before and needs_rows_from_0(exact_parts(score)):
            raise NotInKernelsError("scores that divide the query's position, if queries stand before key 0")
    problem = AttentionProblem(
        name=pattern.name,
        header=header_lines(pattern, node, form),
        by_query=by_query,
        by_key=by_key,
        dk=heads.dk,
        dv=heads.dv,
        dtype=heads.dtype,
        tensors=tuple(dict.fromkeys([*read_tensors(roots), *(score.inputs if score else ())])),
        sizes=tuple(
            sorted({n.name for root in roots for n in walk(root) if isinstance(n, Extent)} - {*FIXED, "dk", "dv"})
        ),
        documents=bool(range_walks) and pattern.documents is not None,
        score=score,
        widths=heads.widths or (heads.dk, heads.dv),
        tf32=heads.tf32,
        delayed=target.delayed and heads.dtype != "float32" and (score is None or score.has_late_values),
        boxes=target.boxes,
        guarded=target.delayed,
        grouped=heads.grouped,
        registers=target.registers,
        specialised=target.specialised and heads.dtype != "float32",
    )
    hidden_by_inputs = hides_by_inputs(pattern)
    return AttentionKernels(
        problem, target, form, reason, {} if bricked is None else bricked, tile_overrides, hidden_by_inputs
    )


def load_of(score: ScoreFormula | None) -> Load:
    """Return which numbers a score loads."""
    if score is None:
        return "plain"
    return "pairs" if score.reads_pairs else "terms"


BRICKED: tuple[Stage, ...] = ("forward", "dq", "dkdv")
"""Stages whose kernels can walk bricks."""


def _bricks(pattern: Pattern, node: Attend, shapes: Mapping[Stage, TileShape]) -> dict[Stage, Bricked] | None:
    """Return the relation in bricks, for the tiles of every stage; None if bricks do not fit."""
    if pattern.documents is not None or find_ranges(node.visible, "k") is not None:
        return None
    wanted = [(tiles.q_tile, tiles.k_tile) for tiles in shapes.values()]
    relations = find_bricked(pattern, node.visible, wanted)
    return None if relations is None else dict(zip(shapes, relations, strict=True))


@verified
def with_widths(node: Attend, widths: tuple[int, int]) -> Attend:
    """Return the attention for heads of these widths."""
    sizes: dict[Index, Index] = {fold.extent(n): fold.const(w) for n, w in zip(("dk", "dv"), widths, strict=True)}
    weights = node.weights if isinstance(node.weights, Softmax) else substitute_value(node.weights, sizes)
    return replace(node, score=substitute_value(node.score, sizes), weights=weights)


def _walks(pattern: Pattern, node: Attend, on_host: str | None, before: bool) -> tuple[Form, Walk, Walk, str]:
    """Return the form, the walks by rows of queries and of keys, and the reason, for tiles of consecutive tokens."""
    by_query, by_key = find_ranges(node.visible, "k"), find_ranges(node.visible, "q")
    windows = pattern.documents is not None
    listed = before and not windows and needs_rows_from_0([*ends(by_query or ()), *ends(by_key or ())])
    if by_query and by_key and can_compute_ends(by_query, by_key) and not listed:
        count = len(by_query)
        reason = f"each row sees {'one range' if count == 1 else f'{count} ranges'} of keys: bounds in the kernel"
        return "ranges", RangedWalk(by_query, windows), RangedWalk(by_key, windows), reason
    if windows:
        raise NotInKernelsError("documents, unless each row sees a few ranges of keys")
    if _reads_selections(pattern):
        return _mask_walks(pattern, on_host)
    return (
        "lists",
        ListedWalk(runs=False),
        ListedWalk(runs=False),
        "rows do not see a few ranges of keys: tiles are listed",
    )


def _reads_selections(pattern: Pattern) -> bool:
    """Whether selections decide which pairs are visible."""
    return bool({item.given for item in pattern.selections} & content_masks([pattern.attend.visible]))


def _mask_walks(pattern: Pattern, on_host: str | None) -> tuple[Form, Walk, Walk, str]:
    """Return the walks of a relation that reads content masks, which every call computes anew."""
    try:
        if on_host is None:
            mask_tiles = MaskTiles(find_mask_relation(pattern))
            return (
                "content",
                mask_tiles,
                mask_tiles,
                "tile lists made on the device in every call; kernels read what was selected",
            )
    except NotInKernelsError as error:
        on_host = f"kernels do not compute {error}"
    reason = f"tile lists made on the host in every call: {on_host}"
    return "lists", ListedWalk(runs=False), ListedWalk(runs=False), reason


def can_compute_ends(*ranges: object) -> bool:
    """Whether a kernel can compute the ends of ranges: by its operations, from inputs at the row's own position."""
    for token_ranges in ranges:
        for end in ends(token_ranges):  # type: ignore[arg-type]
            for node in walk(end):
                if isinstance(node, Lookup) and not all(map(_is_row_position, node.tensor.dims, node.indices)):
                    return False
                if isinstance(node, Arith) and not is_kernel_operation(node):
                    return False
    return True


def _is_row_position(dim: str | int, index: Index) -> bool:
    if dim in ("batch", "head", "kv_head"):
        return isinstance(index, HeadIndex) and index.name == dim
    return dim in ("query", "key", "token") and isinstance(index, Position)


def exact_parts(score: ScoreFormula) -> list[Index]:
    """Return the exact expressions that kernels compute for pairs."""
    derivatives = score.derivatives
    values = [score.formula, *(d.by for d in derivatives)]
    children = {node for value in values for part in value.below for node in part.children()}
    return [
        *sorted((n for n in children if not isinstance(n, VALUES)), key=lambda n: n.digest),
        *(d.where for d in derivatives),
    ]


def read_tensors(roots: list[Index]) -> Iterator[Tensor]:
    """Yield the inputs that expressions read."""
    for root in roots:
        yield from (n.tensor for n in walk(root) if isinstance(n, Lookup))


def header_lines(pattern: Pattern, node: Attend, form: Form) -> tuple[str, ...]:
    """Return the header of a kernel's text: the pattern, its parameters, and the relation.

    The relation is left out if tiles are listed, as the text does not depend on it. Open extents have no values.
    """
    if form == "lists":
        return (f"{pattern.name}: made by attnc. The tiles that are walked are listed.",)
    relation, sizes = node.visible, set[str]()
    if form == "bricks" and pattern.general is not None and relation in pattern.general.known:
        relation, sizes = pattern.general.known[relation], set(pattern.general.sizes)
    values = ", ".join(name if name in sizes else f"{name} = {value}" for name, value in pattern.parameters.items())
    title = f"{pattern.name}({values})" if values else pattern.name
    visible = print_index(relation)
    condition = visible if len(visible) <= 400 else f"{visible[:397]}..."
    return (f"{title}: made by attnc from", f"    visible {condition}")
