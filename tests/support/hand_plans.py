"""Plans written by hand, each with the relation that it must compute."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.planning.cpu_plan import (
    GridMask,
    Group,
    Mask,
    Plan,
    PlanPiece,
    Strip,
    StripAxis,
    TileCounts,
    stretch,
    strip,
)

Relation = NDArray[np.bool_]
"""Visible pairs, (batch, head, query, key)."""
Case = tuple[Plan, Relation]
Shape = tuple[int, int, int, int]
"""Batch, query heads, key heads, length."""


def make_plan(shape: Shape, relation: Relation, groups: tuple[Group, ...], masks: tuple[Mask, ...] = ()) -> Plan:
    batch, heads, kv_heads, _ = shape
    for mask in masks:
        mask.flags.writeable = False
    return Plan(
        n_q=relation.shape[2],
        n_k=relation.shape[3],
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_tile=32,
        k_tile=32,
        tiles=TileCounts(0, 0, 0, 0),
        visible=int(relation.sum()),
        groups=groups,
        masks=tuple(GridMask((mask,)) for mask in masks),
        executor="cpu",
        schedule="pieces",
        reasons=(),
        fallback=None,
        exact_mask=lambda b, h, r0, r1, k0, k1: relation[b, h, r0:r1, k0:k1],
    )


def everyone(shape: Shape, *pieces: PlanPiece) -> tuple[Group, ...]:
    return (Group(tuple(range(shape[0])), tuple(range(shape[1])), pieces),)


def spread(shape: Shape, relation: NDArray[np.bool_]) -> Relation:
    return np.broadcast_to(relation, (*shape[:2], *relation.shape[-2:]))


def delta(n: int) -> NDArray[np.int64]:
    return np.arange(n)[:, None] - np.arange(n)[None, :]


def whole(n: int) -> Strip:
    return strip(0, 0, 1, n)


def causal(shape: Shape) -> Case:
    n = shape[3]
    relation = spread(shape, delta(n) >= 0)
    return make_plan(shape, relation, everyone(shape, PlanPiece(whole(n), whole(n), "causal"))), relation


def full(shape: Shape) -> Case:
    n = shape[3]
    relation = spread(shape, np.ones((n, n), bool))
    return make_plan(shape, relation, everyone(shape, PlanPiece(whole(n), whole(n), "full"))), relation


def window_pieces(n: int, w: int, r: int, first_mask: int = 0) -> tuple[list[PlanPiece], list[Mask]]:
    """Return the pieces of a causal window of `w` keys with row tile `r`: edge rows, interior tiles, a ragged end."""
    d = delta(n)
    window = (d >= 0) & (d < w)
    edge = min(-(-(w - 1) // r) * r, n)
    count, tail = divmod(n - edge, r)
    pieces: list[PlanPiece] = []
    masks: list[Mask] = []

    def add(queries: Strip, keys: Strip) -> None:
        pieces.append(PlanPiece(queries, keys, first_mask + len(masks)))
        rows = slice(queries.start, queries.start + queries.length)
        masks.append(window[rows, keys.start : keys.start + keys.length].copy())

    if edge:
        add(whole(edge), whole(edge))
    if count:
        add(strip(edge, r, count, r), strip(edge - w + 1, r, count, w - 1 + r))
    if tail:
        add(strip(n - tail, 0, 1, tail), strip(n - tail - w + 1, 0, 1, w - 1 + tail))
    return pieces, masks


def window(shape: Shape, w: int = 20, r: int = 16) -> Case:
    n = shape[3]
    pieces, masks = window_pieces(n, w, r)
    relation = spread(shape, (delta(n) >= 0) & (delta(n) < w))
    return make_plan(shape, relation, everyone(shape, *pieces), tuple(masks)), relation


def sinks(shape: Shape, w: int = 9, s: int = 3, r: int = 8) -> Case:
    """Return a window merged with sinks: edge rows see only some sinks or none; later rows have tiles on those keys."""
    n = shape[3]
    d, keys = delta(n), np.arange(n)[None, :]
    relation = (d >= 0) & ((d < w) | (keys < s))
    pieces, masks = window_pieces(n, w, r)
    first, ramp = w - 1, min(n, w + s)
    if ramp > first:
        pieces.append(PlanPiece(strip(first, 0, 1, ramp - first), whole(s), len(masks), fresh=False))
        masks.append((d >= w)[first:ramp, :s].copy())
    count, tail = divmod(max(n - ramp, 0), r)
    if count:
        pieces.append(PlanPiece(strip(ramp, r, count, r), strip(0, 0, count, s), "full", fresh=False))
    if tail:
        pieces.append(PlanPiece(strip(n - tail, 0, 1, tail), whole(s), "full", fresh=False))
    return make_plan(shape, spread(shape, relation), everyone(shape, *pieces), tuple(masks)), spread(shape, relation)


def documents(shape: Shape) -> Case:
    n = shape[3]
    cuts = sorted({0, n // 5, n // 2, n // 2 + 1, n} - ({0} if n == 0 else set()))
    relation = np.zeros((n, n), bool)
    pieces = []
    for a, b in pairwise(cuts):
        relation[a:b, a:b] = delta(b - a) >= 0
        pieces.append(PlanPiece(strip(a, 0, 1, b - a), strip(a, 0, 1, b - a), "causal"))
    return make_plan(shape, spread(shape, relation), everyone(shape, *pieces)), spread(shape, relation)


def blocks(shape: Shape) -> Case:
    """Return causal blocks of 4 in one piece; the remaining tokens see no key and no query sees them."""
    n, r = shape[3], 4
    t = np.arange(n)
    inside = t < n // r * r
    relation = (delta(n) >= 0) & (t[:, None] // r == t[None, :] // r) & inside & inside[:, None]
    tokens = strip(0, r, n // r, r)
    return make_plan(shape, spread(shape, relation), everyone(shape, PlanPiece(tokens, tokens, "causal"))), spread(
        shape, relation
    )


def overlapping(shape: Shape, step: int = 3, length: int = 20) -> Case:
    """Return a plan in which three rows see twenty keys, runs of keys overlap seven-fold, and early rows see no key."""
    n = shape[3]
    count = max((n - length) // step, 0)
    relation = np.zeros((n, n), bool)
    for i in range(count):
        relation[length + i * step : length + (i + 1) * step, i * step : i * step + length] = True
    piece = PlanPiece(strip(length, step, count, step), strip(0, step, count, length), "full")
    return make_plan(shape, spread(shape, relation), everyone(shape, piece)), spread(shape, relation)


def bricks(shape: Shape) -> Case:
    """Return windows of 3 × 5 around the bricks of a grid, keys gathered; rows outside the grid see no key."""
    n = shape[3]
    width = 10
    height = n // width
    down, across = (height - 2) // 2, (width - 4) // 3
    if down < 1:
        return full(shape)
    y_mask = np.abs(np.arange(2)[:, None] - np.arange(4)[None, :] + 1) <= 1
    x_mask = np.abs(np.arange(3)[:, None] - np.arange(7)[None, :] + 2) <= 2
    queries = Strip(width + 2, (StripAxis(2 * width, down, 2, width), StripAxis(3, across, 3)))
    keys = Strip(0, (StripAxis(2 * width, down, 4, width), StripAxis(3, across, 7)))
    y, x = np.divmod(np.arange(n), width)
    inside = (y >= 1) & (y < 1 + 2 * down) & (x >= 2) & (x < 2 + 3 * across) & (y < height)
    near = (np.abs(y[:, None] - y[None, :]) <= 1) & (np.abs(x[:, None] - x[None, :]) <= 2)
    relation = spread(shape, near & inside[:, None])
    plan = make_plan(shape, relation, everyone(shape, PlanPiece(queries, keys, 0)))
    return replace(plan, masks=(GridMask((y_mask, x_mask)),)), relation


def dense(shape: Shape, r: int = 24) -> Case:
    """Return an arbitrary relation per row block; some rows and one whole block see no key."""
    n = shape[3]
    relation = np.random.default_rng(n).random((n, n)) < 0.3
    relation[n // 3 : n // 3 + 2] = False
    relation[r : 2 * r] = False
    count, tail = divmod(n, r)
    pieces = [PlanPiece(strip(0, r, count, r), strip(0, 0, count, n), "exact")]
    if tail:
        pieces.append(PlanPiece(strip(n - tail, 0, 1, tail), whole(n), "exact"))
    return make_plan(shape, spread(shape, relation), everyone(shape, *pieces)), spread(shape, relation)


def blind(shape: Shape) -> Case:
    """Return two masked pieces on the same rows, each with rows that see no key, some of which are common to both."""
    n = shape[3]
    relation = np.random.default_rng(n).random((n, n)) < 0.5
    t = np.arange(n)
    relation[t % 3 == 0, : n // 2] = False
    relation[t % 5 == 0, n // 2 :] = False
    left, right = relation[:, : n // 2].copy(), relation[:, n // 2 :].copy()
    pieces = (
        PlanPiece(whole(n), strip(0, 0, 1, n // 2), 0),
        PlanPiece(whole(n), strip(n // 2, 0, 1, n - n // 2), 1, fresh=False),
    )
    return make_plan(shape, spread(shape, relation), everyone(shape, *pieces), (left, right)), spread(shape, relation)


def by_head(shape: Shape) -> Case:
    """Return a plan of causal heads (every third) and heads with windows; heads of one kv head are in two groups."""
    batch, heads, _, n = shape
    kinds: tuple[tuple[int, ...], ...] = tuple(tuple(range(start, heads, 3)) for start in range(min(3, heads)))
    relation = np.zeros((batch, heads, n, n), bool)
    groups: list[Group] = []
    masks: list[Mask] = []
    for kind, members in enumerate(kinds):
        w = (n, 7, 12)[kind]
        relation[:, list(members)] = (delta(n) >= 0) & (delta(n) < w)
        pieces, more = window_pieces(n, w, 8, len(masks))
        masks += more
        groups.append(Group(tuple(range(batch)), members, tuple(pieces)))
    return make_plan(shape, relation, tuple(groups), tuple(masks)), relation


def by_batch(shape: Shape) -> Case:
    """Return a plan whose entry b has documents of b + 5 tokens; the last of several entries sees no key."""
    batch, heads, _, n = shape
    relation = np.zeros((batch, heads, n, n), bool)
    groups = []
    for b in range(max(batch - 1, 1)):
        pieces = []
        for a in range(0, n, b + 5):
            tokens = stretch(a, min(a + b + 5, n))
            relation[b, :, a : tokens.last + 1, a : tokens.last + 1] = delta(tokens.length) >= 0
            pieces.append(PlanPiece(tokens, tokens, "causal"))
        groups.append(Group((b,), tuple(range(heads)), tuple(pieces)))
    return make_plan(shape, relation, tuple(groups)), relation


PATTERNS: tuple[Callable[[Shape], Case], ...] = (
    causal,
    full,
    window,
    sinks,
    documents,
    blocks,
    overlapping,
    bricks,
    dense,
    blind,
    by_head,
    by_batch,
)
