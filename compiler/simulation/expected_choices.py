"""The expected work of a selection, known before a call: how many blocks a row keeps, not which.

A row is expected to keep any of its candidates alike. What a threshold or a mass keeps is taken to be all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from attnc.compiler import ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.planning.selected_keys import BlockKeys

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

SAMPLED = 512
"""Queries that are looked at, evenly spread."""

AT_ONCE = 1 << 22
"""Pairs that are looked at together."""


@dataclass(frozen=True)
class Taking:
    """A selection whose expressions are specialised: `rows` choose among `items` places.

    `kept`: how many each row keeps, or all rows together (`pairs`); None where content tells.
    """

    rows: int
    items: int
    candidates: ir.Index
    always: ir.Index
    kept: int | None
    pairs: bool = False


@dataclass(frozen=True, eq=False)
class ExpectedChoice:
    """The expectation for one head, by block: its keys, and the expected queries that see all or some of them.

    `pairs`: of a query and a key that are expected to meet; `most`: if each row keeps the places with most keys.
    `slots`: places of a row at most.
    """

    keys: Int64
    whole: Float64
    part: Float64
    pairs: float
    most: int
    triangles: bool
    slots: int

    @property
    def without_places(self) -> ExpectedChoice:
        """Return the expectation where blocks are not computed one by one."""
        nothing = np.zeros(0)
        return replace(self, keys=nothing.astype(np.int64), whole=nothing, part=nothing)


def expected_choice(places: BlockKeys, taking: Taking, n_q: int, n_k: int) -> ExpectedChoice:
    """Return the expected selection of one head. Raises EvaluationError."""
    count = len(places.starts) - 1
    queries = np.unique(np.linspace(0, n_q - 1, min(SAMPLED, n_q)).round().astype(np.int64))
    rows = queries if places.row_of is None else places.row_of[queries]
    each = n_q / max(len(queries), 1)
    sizes = np.diff(places.starts)
    all_places = np.arange(count)
    candidates, always = (_holds(x, rows, all_places) for x in (taking.candidates, taking.always))
    among = candidates.sum(1, keepdims=True)
    share = _share(taking, among, each * taking.rows / max(n_q, 1))
    likely = np.where(always, 1.0, candidates * share)
    whole, part, pairs, most = np.zeros(count), np.zeros(count), 0.0, 0.0
    for some in _blocks(len(queries), n_k):
        seen = _seen(places, queries[some], n_k)
        whole += (likely[some] * ((seen == sizes) & (sizes > 0))).sum(0)
        part += (likely[some] * ((seen > 0) & (seen < sizes))).sum(0)
        pairs += float((likely[some] * seen).sum())
        besides = np.sort(np.where(candidates[some] & ~always[some], seen, 0), axis=1)[:, ::-1]
        best = besides if taking.kept is None or taking.pairs else besides[:, : taking.kept]
        most += float(best.sum() + (seen * always[some]).sum())
    triangles = places.diagonal is not None and places.order is None
    kept = count if taking.kept is None or taking.pairs else taking.kept + int(always.sum(1).max(initial=0))
    slots = min(kept, count)
    return ExpectedChoice(sizes, whole * each, part * each, pairs * each, round(most * each), triangles, slots)


def all_taken(pairs: int) -> ExpectedChoice:
    """Return the expectation of a head's pairs for a selection that is not among blocks: all of them."""
    nothing = np.zeros(0)
    return ExpectedChoice(nothing.astype(np.int64), nothing, nothing, float(pairs), pairs, False, 0)


def _share(taking: Taking, among: Int64, each: float) -> Float64:
    """Return the share of each row's candidates that it keeps."""
    if taking.kept is None:
        return np.ones(among.shape)
    whole = np.maximum(among, 1) if not taking.pairs else np.maximum(among.sum() * each, 1)
    return np.minimum(taking.kept / whole, 1.0)


def _holds(condition: ir.Index, rows: Int64, places: Int64) -> NDArray[np.bool_]:
    alive = np.ones((len(rows), len(places)), dtype=np.bool_)
    if isinstance(condition, ir.Truth):
        return alive & condition.value
    return exact_evaluation.mask_at(condition, rows, places, alive, {}, wide=_wide(condition, rows, places))


def _seen(places: BlockKeys, queries: Int64, n_k: int) -> Int64:
    """Keys of each place that each query sees if it takes it."""
    starts, stops = places.starts[:-1], places.starts[1:]
    if places.order is None and places.diagonal is not None:
        last = queries[:, None] + places.diagonal + 1
        return np.asarray(np.clip(last - starts, 0, stops - starts))
    keys = np.arange(n_k) if places.order is None else places.order
    before = np.zeros((len(queries), len(keys) + 1), dtype=np.int64)
    np.cumsum(_holds(places.rest, queries, keys), axis=1, out=before[:, 1:])
    return np.asarray(before[:, stops] - before[:, starts])


def _wide(condition: ir.Index, rows: Int64, places: Int64) -> bool:
    last_row, last_place = (int(x.max()) + 1 if len(x) else 1 for x in (rows, places))
    return not fits_word(condition, (0, last_row), (0, last_place))


def _blocks(rows: int, keys: int) -> Iterator[slice]:
    step = max(AT_ONCE // max(keys, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)
