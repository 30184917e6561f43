"""The plan: what an executor does for one shape, as a short list of pieces on strided views.

A plan holds no tensor and no device state; masks are numpy arrays, and it may be printed, compared and sent elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.cache_need import CacheNeed, needed_by_all
from attnc.compiler.planning.call_memory import Memory

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
        """From the first token to the last."""
        return (self.count - 1) * self.step + (self.length - 1) * self.stride

    @property
    def apart(self) -> bool:
        """Whether the stretches share no token: each ends before the next, or all lie between two of the first's."""
        return self.count <= 1 or self.step >= self.length * self.stride or 0 < self.step * self.count <= self.stride


@dataclass(frozen=True, slots=True)
class Strip:
    """Stretches of tokens, along one axis or several: stretch (i, j, …) begins at `start + Σ i_a · step_a`.

    Its tokens are those `Σ l_a · stride_a` after that, `l_a < length_a`; stretches and tokens are numbered with the
    last axis fastest. Bricks of a grid of tokens have an axis for each of the grid's, anything else has one. Stretches
    of queries never share a token; stretches of keys may (`step < length`, even 0).
    """

    start: int
    axes: tuple[StripAxis, ...]

    @property
    def count(self) -> int:
        """Stretches."""
        return prod(axis.count for axis in self.axes)

    @property
    def length(self) -> int:
        """Tokens of a stretch."""
        return prod(axis.length for axis in self.axes)

    @property
    def last(self) -> int:
        """The last token."""
        return self.start + sum(axis.reach for axis in self.axes)

    @property
    def is_plain(self) -> bool:
        """Whether there is one axis, of adjacent tokens."""
        return len(self.axes) == 1 and self.axes[0].stride == 1

    def starts(self) -> Tokens:
        """The first token of every stretch."""
        return self.start + _lattice([(axis.count, axis.step) for axis in self.axes])

    def inside(self) -> Tokens:
        """The tokens of a stretch, from its first."""
        return _lattice([(axis.length, axis.stride) for axis in self.axes])

    def flat(self) -> Strip | None:
        """Return the stretches along one axis, where their starts and their tokens are evenly spaced, else None."""
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
        one = f"{self.start}..{self.start + (axis.length - 1) * axis.stride + 1}"
        one = one if axis.stride == 1 else f"{one} by {axis.stride}"
        return one if axis.count == 1 else f"{axis.count} × [{one} step {axis.step}]"


def _lattice(axes: Iterable[tuple[int, int]]) -> Tokens:
    tokens = np.zeros(1, dtype=np.int64)
    for size, step in axes:
        tokens = (tokens[:, None] + np.arange(size, dtype=np.int64) * step).ravel()
    return tokens


def _merged(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, step) of axes, the last fastest, those joined that together are evenly spaced; at least one."""
    kept = [(size, step) for size, step in axes if size > 1] or axes[-1:]
    result = kept[:1]
    for size, step in kept[1:]:
        outer, outer_step = result[-1]
        if outer_step == size * step:
            result[-1] = (outer * size, step)
        else:
            result.append((size, step))
    return result


def strip(start: int, step: int, count: int, length: int, stride: int = 1) -> Strip:
    """Stretches along one axis."""
    return Strip(start, (StripAxis(step, count, length, stride),))


def stretch(start: int, stop: int) -> Strip:
    """One stretch of adjacent tokens."""
    return strip(start, 0, 1, stop - start)


def is_triangular(mask: Mask) -> bool:
    """Whether no row r sees a column beyond number r."""
    return not any(mask[r, r + 1 :].any() for r in range(min(mask.shape)))


@dataclass(frozen=True, slots=True, eq=False)
class GridMask:
    """The relation on the rows and keys of a stretch, as a product: one factor for each axis of their strips."""

    factors: tuple[Mask, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, keys."""
        return prod(f.shape[0] for f in self.factors), prod(f.shape[1] for f in self.factors)

    @property
    def is_triangular(self) -> bool:
        """Whether no row r sees a column beyond number r, so that the kernel may leave those out."""
        return len(self.factors) == 1 and is_triangular(self.factors[0])

    def whole(self) -> Mask:
        """All factors multiplied out: bool (rows, keys)."""
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
    log-sum-exp with what is there, which is nothing in rows that no piece has written.
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
    """Batch entries and query heads that share one list of pieces. Rows in no piece see nothing."""

    batches: tuple[int, ...]
    heads: tuple[int, ...]
    pieces: tuple[PlanPiece, ...]


@dataclass(frozen=True, slots=True)
class TileCounts:
    """Tiles of the (head-summed, batch-summed) attention matrix by class, at the plan's tile size.

    `total` counts dense attention's in natural order, the others those that the plan computes, in the order it takes.
    """

    total: int
    live: int
    full: int
    partial: int


ExactMask = Callable[[int, int, int, int, int, int], Mask]
"""(batch, head, row start, row stop, key start, key stop) → the relation there, (rows, keys)."""


_BYTES_OF_PIECE = 768
"""Approximate bytes of a `PlanPiece` with its strips and axes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Pieces for every batch entry and head of one call shape, with the reasons for the choice.

    `visible` is the number of visible pairs over batch and heads, None where it was not counted. `fallback` says why no
    tile plan exists, where none does. `branches`: the plans of several attentions, by name, whose sums these are.
    `executor`: "torch" is tiles as operations of torch on a GPU. `pattern`: its name.
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
        """The memory of a call of one softmax over plain scores, in bytes; None: it is not told."""
        return self.memory_of()

    @property
    def cache(self) -> CacheNeed | None:
        """The tokens that a cache must hold for the next ones; None: all, or it is not known."""
        return self.cache_of()

    def __str__(self) -> str:
        from attnc.compiler.planning.print_plan import print_plan

        return print_plan(self)


def joined(plans: Sequence[tuple[str, Plan]]) -> Plan:
    """The plans of several attentions of one call as one, which only counts: each is run by itself."""
    own = [plan for _, plan in plans]
    visible = [plan.visible for plan in own]
    fallback = next((f"{name}: {plan.fallback}" for name, plan in plans if plan.fallback is not None), None)
    t = [plan.tiles for plan in own]
    return replace(
        own[0],
        n_k=max(plan.n_k for plan in own),
        tiles=TileCounts(*(sum(getattr(x, f) for x in t) for f in ("total", "live", "full", "partial"))),
        visible=None if None in visible else sum(n for n in visible if n is not None),
        groups=(),
        masks=(),
        schedule="branches",
        reasons=(f"{len(own)} attentions, one after another, then what joins them",),
        fallback=fallback,
        branches=tuple(plans),
        memory_of=lambda: None,
        cache_of=lambda: needed_by_all(plan.cache for plan in own),
    )
