"""The plan of a call shape: a short list of pieces, each a kernel call on strided views, and their masks.

A plan holds no tensor and no device state; masks are numpy arrays. It can be printed, compared and serialised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.planning.cache_need import CacheNeed, needed_by_all

KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Memory:
    """The bytes that a call saves, and the peaks of its forward and backward beyond arguments and results.

    `saved`: q, k, v, out and LSE, which are saved for the backward. `forward`: the peak beyond q, k, v, out and LSE.
    `backward`: the peak beyond these, the gradient of out, and the gradients of q, k and v. Excluded are memory kept
    between calls (`SETTINGS`) and a gradient of the LSE, which takes another copy of all operands.
    """

    saved: int
    forward: int
    backward: int

    def __str__(self) -> str:
        return (
            f"saves {as_bytes(self.saved)}; takes {as_bytes(self.forward)} forward, {as_bytes(self.backward)} backward"
        )


def as_bytes(count: int) -> str:
    """Return a number of bytes as text in the largest unit that fits."""
    unit, name = next(
        (u, n) for u, n in ((KIB**3, "GiB"), (KIB**2, "MiB"), (KIB, "KiB"), (1, "B")) if count >= u or u == 1
    )
    return f"{count / unit:.3g} {name}" if unit > 1 else f"{count} B"


Mask = NDArray[np.bool_]
"""A relation on some rows and keys: bool (rows, keys)."""

Tokens = NDArray[np.int64]

Schedule = Literal[
    "pieces",
    "dense by row blocks",
    "dense",
    "branches",
    "loop bounds",
    "bricks",
    "tile lists",
    "gathered queries",
    "gathered tokens",
    "chosen tiles",
]


@dataclass(frozen=True, slots=True)
class StripAxis:
    """One axis of a strip: `count` stretches `step` (≥ 0) tokens apart, of `length` tokens `stride` (> 0) apart."""

    step: int
    count: int
    length: int
    stride: int = 1

    @property
    def reach(self) -> int:
        """The distance from the first token to the last."""
        return (self.count - 1) * self.step + (self.length - 1) * self.stride

    @property
    def apart(self) -> bool:
        """Whether stretches share no token: each ends before the next, or all fit between two tokens of the first."""
        return self.count <= 1 or self.step >= self.length * self.stride or 0 < self.step * self.count <= self.stride


@dataclass(frozen=True, slots=True)
class Strip:
    """Stretches of tokens, along one axis or several: stretch (i, j, …) begins at `start + Σ i_a · step_a`.

    Its tokens lie at distances `Σ l_a · stride_a` from there, with `l_a < length_a`; stretches and tokens are numbered
    with the last axis fastest. Bricks of a grid of tokens have one axis for each axis of the grid; all other strips
    have one axis. Stretches of queries never share a token; stretches of keys may (`step < length`, even 0).
    """

    start: int
    axes: tuple[StripAxis, ...]

    @property
    def count(self) -> int:
        """The number of stretches."""
        return prod(axis.count for axis in self.axes)

    @property
    def length(self) -> int:
        """The number of tokens of a stretch."""
        return prod(axis.length for axis in self.axes)

    @property
    def last(self) -> int:
        """The last token."""
        return self.start + sum(axis.reach for axis in self.axes)

    @property
    def is_plain(self) -> bool:
        """Whether the strip has a single axis of adjacent tokens."""
        return len(self.axes) == 1 and self.axes[0].stride == 1

    def starts(self) -> Tokens:
        """Return the first token of every stretch."""
        return self.start + _lattice([(axis.count, axis.step) for axis in self.axes])

    def inside(self) -> Tokens:
        """Return the offsets of a stretch's tokens from its first token."""
        return _lattice([(axis.length, axis.stride) for axis in self.axes])

    def flat(self) -> Strip | None:
        """Return the strip along one axis if its starts and its tokens are evenly spaced, else None."""
        if len(self.axes) == 1:
            return self
        counts = _merged([(axis.count, axis.step) for axis in self.axes])
        lengths = _merged([(axis.length, axis.stride) for axis in self.axes])
        if len(counts) > 1 or len(lengths) > 1:
            return None
        (count, step), (length, stride) = counts[0], lengths[0]
        return strip(self.start, step, count, length, stride)

    def moved(self, tokens: int) -> Strip:
        """Return the strip moved by a number of tokens."""
        return replace(self, start=self.start + tokens)

    def __str__(self) -> str:
        if len(self.axes) > 1:
            bricks = "×".join(str(axis.length) for axis in self.axes)
            counts = "×".join(str(axis.count) for axis in self.axes)
            steps = ", ".join(str(axis.step) for axis in self.axes)
            return f"{counts} × bricks of {bricks} from {self.start} step {steps}"
        axis = self.axes[0]
        text = f"{self.start}..{self.start + (axis.length - 1) * axis.stride + 1}"
        text = text if axis.stride == 1 else f"{text} by {axis.stride}"
        return text if axis.count == 1 else f"{axis.count} × [{text} step {axis.step}]"


def _lattice(axes: Iterable[tuple[int, int]]) -> Tokens:
    """Return all sums of multiples of the steps of (size, step) axes, the last axis fastest."""
    tokens = np.zeros(1, dtype=np.int64)
    for size, step in axes:
        tokens = (tokens[:, None] + np.arange(size, dtype=np.int64) * step).ravel()
    return tokens


def _merged(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the (size, step) pairs of axes, last fastest, with evenly spaced neighbours joined; at least one pair."""
    long_axes = [(size, step) for size, step in axes if size > 1] or axes[-1:]
    result = long_axes[:1]
    for size, step in long_axes[1:]:
        outer, outer_step = result[-1]
        if outer_step == size * step:
            result[-1] = (outer * size, step)
        else:
            result.append((size, step))
    return result


def strip(start: int, step: int, count: int, length: int, stride: int = 1) -> Strip:
    """Return a strip of `count` stretches along one axis."""
    return Strip(start, (StripAxis(step, count, length, stride),))


def stretch(start: int, stop: int) -> Strip:
    """Return a strip of one stretch of adjacent tokens."""
    return strip(start, 0, 1, stop - start)


def is_triangular(mask: Mask) -> bool:
    """Whether row r sees no column after column r, for every r."""
    return not any(mask[r, r + 1 :].any() for r in range(min(mask.shape)))


@dataclass(frozen=True, slots=True, eq=False)
class GridMask:
    """The relation on the rows and keys of a stretch, as a product: one factor for each axis of their strips."""

    factors: tuple[Mask, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the mask: (rows, keys)."""
        return prod(f.shape[0] for f in self.factors), prod(f.shape[1] for f in self.factors)

    @property
    def is_triangular(self) -> bool:
        """Whether row r sees no column after column r, so that the kernel may skip those columns."""
        return len(self.factors) == 1 and is_triangular(self.factors[0])

    def whole(self) -> Mask:
        """Return the product of all factors: bool (rows, keys)."""
        result = self.factors[0]
        for factor in self.factors[1:]:
            (a, b), (c, d) = result.shape, factor.shape
            result = (result[:, None, :, None] & factor[None, :, None, :]).reshape(a * c, b * d)
        return result


@dataclass(frozen=True, slots=True)
class PlanPiece:
    """One call of the kernel: stretch i of queries sees stretch i of keys (`queries.count == keys.count`).

    `mask`: "full" (all pairs), "causal" (row r of a stretch sees columns <= r; queries.length == keys.length),
    "exact" (each stretch's mask is computed when the piece runs), or an index into `Plan.masks`, shared by all
    stretches. `fresh`: no earlier piece of the group has written these rows; otherwise the result is merged by
    log-sum-exp with the earlier result, which is empty in rows that no piece has written.
    """

    queries: Strip
    keys: Strip
    mask: Literal["full", "causal", "exact"] | int
    fresh: bool = True

    @property
    def elements(self) -> int:
        """Score elements computed for one head (a causal piece counts half)."""
        n = self.queries.count * self.queries.length * self.keys.length
        return (n + self.queries.count * self.queries.length) // 2 if self.mask == "causal" else n


@dataclass(frozen=True, slots=True)
class Group:
    """Batch entries and query heads that share one list of pieces. A row in no piece sees no key."""

    batches: tuple[int, ...]
    heads: tuple[int, ...]
    pieces: tuple[PlanPiece, ...]


@dataclass(frozen=True, slots=True)
class TileCounts:
    """Tiles of the (head-summed, batch-summed) attention matrix by class, at the plan's tile size.

    `total` counts the tiles of dense attention in natural order; the other fields count the tiles that the plan
    computes, in the plan's order of tokens.
    """

    total: int
    live: int
    full: int
    partial: int


ExactMask = Callable[[int, int, int, int, int, int], Mask]
"""(batch, head, row start, row stop, key start, key stop) → the relation on these rows and keys: (rows, keys)."""


_BYTES_OF_PIECE = 768
"""Approximate bytes of a `PlanPiece` with its strips and axes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Pieces for every batch entry and head of one call shape, with the reasons for the choice.

    `visible`: the number of visible pairs over batch and heads, None where it was not counted. `fallback`: why no tile
    plan exists, None if one does. `branches`: the plans of several attentions by name, if this plan is their sum.
    `executor`: "torch" computes tiles by operations of torch on a GPU. `pattern`: the name of the pattern.
    """

    n_q: int
    n_k: int
    batch: int
    heads: int
    kv_heads: int
    q_tile: int
    k_tile: int
    tiles: TileCounts
    visible: int | None
    groups: tuple[Group, ...]
    masks: tuple[GridMask, ...]
    executor: Literal["cpu", "reference", "torch", "triton"]
    schedule: Schedule
    reasons: tuple[str, ...]
    fallback: str | None
    exact_mask: ExactMask = field(repr=False, compare=False)
    branches: tuple[tuple[str, Plan], ...] = ()
    cache_of: Callable[[], CacheNeed | None] = field(default=lambda: None, repr=False, compare=False)
    pattern: str = ""
    memory_of: Callable[[], Memory | None] = field(default=lambda: None, repr=False, compare=False)
    data: int = field(default=0, repr=False, compare=False)
    """Bytes of inputs that `exact_mask` reads."""

    @property
    def nbytes(self) -> int:
        """Bytes of the plan, approximately: pieces, masks, and the data that `exact_mask` reads."""
        pieces = sum(len(group.pieces) for group in self.groups)
        masks = sum(factor.nbytes for mask in self.masks for factor in mask.factors)
        return _BYTES_OF_PIECE * pieces + masks + self.data + sum(branch.nbytes for _, branch in self.branches)

    @property
    def memory(self) -> Memory | None:
        """The memory in bytes of a call of one softmax over plain scores; None for any other call."""
        return self.memory_of()

    @property
    def cache(self) -> CacheNeed | None:
        """The cached tokens that later queries may see; None: all tokens, or unknown."""
        return self.cache_of()

    def __str__(self) -> str:
        return print_plan(self)


def joined(plans: Sequence[tuple[str, Plan]]) -> Plan:
    """Return a plan that sums the plans of several attentions of a call; it only counts, each plan runs by itself."""
    branch_plans = [plan for _, plan in plans]
    visible = [plan.visible for plan in branch_plans]
    fallback = next((f"{name}: {plan.fallback}" for name, plan in plans if plan.fallback is not None), None)
    tile_counts = [plan.tiles for plan in branch_plans]
    return replace(
        branch_plans[0],
        n_k=max(plan.n_k for plan in branch_plans),
        tiles=TileCounts(*(sum(getattr(x, f) for x in tile_counts) for f in ("total", "live", "full", "partial"))),
        visible=None if None in visible else sum(n for n in visible if n is not None),
        groups=(),
        masks=(),
        schedule="branches",
        reasons=(f"{len(branch_plans)} attentions, run one after another and then combined",),
        fallback=fallback,
        branches=tuple(plans),
        memory_of=lambda: None,
        cache_of=lambda: needed_by_all(plan.cache for plan in branch_plans),
    )


SHOWN = 12
"""Maximum number of pieces that are printed for a group; further pieces are only counted."""


def print_plan(plan: Plan) -> str:
    """Return a plan as text: sizes, tile counts, pieces and reasons, a line each."""
    t = plan.tiles
    visible = "" if plan.visible is None else f", {plan.visible} visible pairs ({_share(plan)})"
    lines = [
        f"plan for {plan.n_q} queries, {plan.n_k} keys, batch {plan.batch}, heads {plan.heads}/{plan.kv_heads}",
        f"executor {plan.executor}: {plan.schedule}{visible}",
        f"tiles {plan.q_tile}×{plan.k_tile}: {t.live} live of {t.total} ({t.full} full, {t.partial} partial)",
    ]
    if plan.fallback is not None:
        lines.append(f"fallback: {plan.fallback}")
    for group in plan.groups:
        lines.extend(_group(plan, group))
    if (cache := plan.cache) is not None:
        lines.append(f"a cache needs {cache}")
    if (memory := plan.memory) is not None:
        lines.append(f"memory: {memory}")
    lines.extend(f"why: {reason}" for reason in plan.reasons)
    for name, branch in plan.branches:
        lines.append(f"{name}:")
        lines.extend(f"  {line}" for line in print_plan(branch).splitlines())
    return "\n".join(lines)


def _share(plan: Plan) -> str:
    pairs = plan.n_q * plan.n_k * plan.batch * plan.heads
    return f"{100 * (plan.visible or 0) / max(pairs, 1):.4g} %"


def _group(plan: Plan, group: Group) -> list[str]:
    lines = [f"  batch {_numbers(group.batches)}, heads {_numbers(group.heads)}: {len(group.pieces)} pieces"]
    lines.extend(f"    {_piece(plan, piece)}" for piece in group.pieces[:SHOWN])
    if len(group.pieces) > SHOWN:
        lines.append(f"    … and {len(group.pieces) - SHOWN} more")
    return lines


def _piece(plan: Plan, piece: PlanPiece) -> str:
    mask = piece.mask
    if isinstance(mask, int):
        rows, columns = plan.masks[mask].shape
        mask_text = f"mask {mask} ({rows}×{columns})"
    else:
        mask_text = {"full": "no mask", "causal": "causal", "exact": "mask evaluated as it runs"}[mask]
    return f"queries {piece.queries} · keys {piece.keys} · {mask_text}{'' if piece.fresh else ' · merged'}"


def _numbers(values: tuple[int, ...]) -> str:
    if len(values) > 2 and values == tuple(range(values[0], values[-1] + 1)):
        return f"{values[0]}..{values[-1] + 1}"
    return ", ".join(map(str, values))
