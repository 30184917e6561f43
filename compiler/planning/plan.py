"""The plan: what an executor does for one shape, as a short list of pieces on strided views.

A plan holds no tensor and no device state; masks are numpy arrays, and it may be printed, compared and sent elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Strip:
    """`count` stretches of `length` tokens, `stride` apart: stretch i has `start + i * step + j * stride`, j < length.

    Stretches of queries never share a token; stretches of keys may (`step < length`, even 0).
    """

    start: int
    step: int
    count: int
    length: int
    stride: int = 1

    @property
    def last(self) -> int:
        """The last token."""
        return self.start + (self.count - 1) * self.step + (self.length - 1) * self.stride

    def tokens(self, stretch: int) -> range:
        """The tokens of one stretch."""
        start = self.start + stretch * self.step
        return range(start, start + self.length * self.stride, self.stride)

    def __str__(self) -> str:
        one = f"{self.start}..{self.start + (self.length - 1) * self.stride + 1}"
        one = one if self.stride == 1 else f"{one} by {self.stride}"
        return one if self.count == 1 else f"{self.count} × [{one} step {self.step}]"


@dataclass(frozen=True, slots=True)
class Piece:
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
    pieces: tuple[Piece, ...]


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


@dataclass(frozen=True, slots=True)
class Plan:
    """Pieces for every batch entry and head of one call shape, with the reasons for the choice.

    `visible` is the number of visible pairs over batch and heads, None where it was not counted. `fallback` says why no
    tile plan exists, where none does.
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
    masks: tuple[Mask, ...]
    executor: Literal["cpu", "reference", "triton"]
    schedule: Literal["pieces", "dense by row blocks", "dense"]
    reasons: tuple[str, ...]
    fallback: str | None
    exact_mask: ExactMask = field(repr=False, compare=False)

    def __str__(self) -> str:
        from attnc.compiler.planning.print_plan import print_plan

        return print_plan(self)
