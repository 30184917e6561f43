"""Invariants of pieces: together they cover the relation once; rows are written before they are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.planning.cpu_plan import GridMask, Plan, PlanPiece, Strip

Grid = NDArray[np.bool_]
Exact = Callable[[int, int, int, int], Grid]
"""A function of (first row, end, first key, end) that returns the relation in this range."""


def stretches(strip: Strip) -> list[list[int]]:
    """Return the tokens of each run, one by one."""
    runs = []
    for index in product(*(range(axis.count) for axis in strip.axes)):
        start = strip.start + sum(i * axis.step for i, axis in zip(index, strip.axes, strict=True))
        inside = product(*(range(axis.length) for axis in strip.axes))
        runs.append([start + sum(i * a.stride for i, a in zip(t, strip.axes, strict=True)) for t in inside])
    return runs


def counted(
    pieces: Iterable[PlanPiece], masks: Sequence[GridMask], n_q: int, n_k: int, exact: Exact
) -> NDArray[np.int64]:
    """Count the pieces that hold each pair, and check every rule of a piece."""
    times = np.zeros((n_q, n_k), dtype=np.int64)
    written = np.zeros(n_q, dtype=np.bool_)
    for piece in pieces:
        queries, keys = stretches(piece.queries), stretches(piece.keys)
        assert len(queries) == len(keys) > 0, piece
        rows = np.zeros(n_q, dtype=np.int64)
        for q, k in zip(queries, keys, strict=True):
            assert 0 <= min(q) <= max(q) < n_q, piece
            assert 0 <= min(k) <= max(k) < n_k, piece
            rows[q] += 1
            times[np.ix_(q, k)] += _mask(piece, masks, q, k, exact)
        assert rows.max() == 1, f"stretches of queries overlap: {piece}"
        mine = rows == 1
        assert not (piece.fresh and written[mine].any()), f"rows written twice: {piece}"
        written |= mine
    return times


def _mask(piece: PlanPiece, masks: Sequence[GridMask], q: list[int], k: list[int], exact: Exact) -> Grid:
    match piece.mask:
        case "full":
            return np.ones((len(q), len(k)), dtype=np.bool_)
        case "causal":
            assert len(q) == len(k), piece
            return np.tri(len(q), dtype=np.bool_)
        case "exact":
            assert piece.queries.is_plain and piece.keys.is_plain, piece
            return exact(q[0], q[-1] + 1, k[0], k[-1] + 1)
        case index:
            mask = masks[index].whole()
            assert mask.shape == masks[index].shape == (len(q), len(k)), piece
            return mask


def check_pieces(pieces: Iterable[PlanPiece], masks: Sequence[GridMask], relation: Grid) -> None:
    """Check that the pieces equal the relation: every visible pair once, no other."""
    n_q, n_k = relation.shape
    times = counted(pieces, masks, n_q, n_k, lambda a, b, c, d: relation[a:b, c:d])
    wrong = np.argwhere(times != relation)
    assert not len(wrong), f"query {wrong[0][0]} and key {wrong[0][1]} are in {times[tuple(wrong[0])]} pieces"


def check_plan(plan: Plan, relation: NDArray[np.bool_]) -> None:
    """Check that a plan equals the relation (batch, heads, queries, keys)."""
    seen = np.zeros(relation.shape[:2], dtype=np.int64)
    for group in plan.groups:
        for batch in group.batches:
            for head in group.heads:
                seen[batch, head] += 1
                check_pieces(group.pieces, plan.masks, relation[batch, head])
                for piece in group.pieces:
                    if piece.mask == "exact":
                        (q, *_), (k, *_) = stretches(piece.queries), stretches(piece.keys)
                        part = plan.exact_mask(batch, head, q[0], q[-1] + 1, k[0], k[-1] + 1)
                        assert (part == relation[batch, head, q[0] : q[-1] + 1, k[0] : k[-1] + 1]).all()
    assert (seen == 1).all(), "every batch entry and head is in one group"
    assert plan.visible in (None, int(relation.sum()))
