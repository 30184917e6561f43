"""The expected work of a selection before a call, when only the number of selected blocks is known.

Every candidate of a row is equally likely to be selected. A threshold or a mass is assumed to keep all candidates.
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
"""Maximum number of queries that are sampled, evenly spaced."""

AT_ONCE = 1 << 22
"""Number of pairs that are evaluated at once."""


@dataclass(frozen=True)
class Taking:
    """A selection with specialised expressions: `rows` rows select among `items` blocks.

    `candidates`, `always`: the conditions of being a candidate, and of being selected in any case. `kept`: the number
    of blocks that each row keeps, or with `pairs` all rows together; None if it depends on content.
    """

    rows: int
    items: int
    candidates: ir.Index
    always: ir.Index
    kept: int | None
    pairs: bool = False


@dataclass(frozen=True, eq=False)
class ExpectedChoice:
    """The expected selection of a head.

    `keys`: the keys of each block. `whole`, `part`: the expected queries that see all, or some, keys of each block.
    `pairs`: the expected number of visible pairs. `most`: that number if each row keeps the blocks with most keys.
    `triangles`: whether partly visible blocks are causal squares. `slots`: the maximum number of blocks of a row.
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
        """The expectation without its blocks, for kernels that do not compute them one by one."""
        nothing = np.zeros(0)
        return replace(self, keys=nothing.astype(np.int64), whole=nothing, part=nothing)


def expected_choice(places: BlockKeys, taking: Taking, n_q: int, n_k: int) -> ExpectedChoice:
    """Return the expected selection of one head. Raises EvaluationError."""
    count = len(places.starts) - 1
    queries = np.unique(np.linspace(0, n_q - 1, min(SAMPLED, n_q)).round().astype(np.int64))
    rows = queries if places.row_of is None else places.row_of[queries]
    queries_per_sample = n_q / max(len(queries), 1)
    sizes = np.diff(places.starts)
    block_numbers = np.arange(count)
    candidates, always = (_holds(x, rows, block_numbers) for x in (taking.candidates, taking.always))
    candidate_count = candidates.sum(1, keepdims=True)
    share = _share(taking, candidate_count, queries_per_sample * taking.rows / max(n_q, 1))
    probability = np.where(always, 1.0, candidates * share)
    whole, part, pairs, most_pairs = np.zeros(count), np.zeros(count), 0.0, 0.0
    for block in _batches(len(queries), n_k):
        seen_keys = _seen_keys(places, queries[block], n_k)
        whole += (probability[block] * ((seen_keys == sizes) & (sizes > 0))).sum(0)
        part += (probability[block] * ((seen_keys > 0) & (seen_keys < sizes))).sum(0)
        pairs += float((probability[block] * seen_keys).sum())
        selectable = np.sort(np.where(candidates[block] & ~always[block], seen_keys, 0), axis=1)[:, ::-1]
        best = selectable if taking.kept is None or taking.pairs else selectable[:, : taking.kept]
        most_pairs += float(best.sum() + (seen_keys * always[block]).sum())
    triangles = places.diagonal is not None and places.order is None
    max_blocks = count if taking.kept is None or taking.pairs else taking.kept + int(always.sum(1).max(initial=0))
    slots = min(max_blocks, count)
    return ExpectedChoice(
        sizes,
        whole * queries_per_sample,
        part * queries_per_sample,
        pairs * queries_per_sample,
        round(most_pairs * queries_per_sample),
        triangles,
        slots,
    )


def all_taken(pairs: int) -> ExpectedChoice:
    """Return the expectation of a selection that is not among blocks: all `pairs` pairs of a head."""
    nothing = np.zeros(0)
    return ExpectedChoice(nothing.astype(np.int64), nothing, nothing, float(pairs), pairs, False, 0)


def _share(taking: Taking, candidate_count: Int64, queries_per_sample: float) -> Float64:
    """Return the share of each row's candidates that it keeps."""
    if taking.kept is None:
        return np.ones(candidate_count.shape)
    total = (
        np.maximum(candidate_count, 1)
        if not taking.pairs
        else np.maximum(candidate_count.sum() * queries_per_sample, 1)
    )
    return np.minimum(taking.kept / total, 1.0)


def _holds(condition: ir.Index, rows: Int64, blocks: Int64) -> NDArray[np.bool_]:
    """Evaluate a condition at rows and blocks: (rows, blocks)."""
    active = np.ones((len(rows), len(blocks)), dtype=np.bool_)
    if isinstance(condition, ir.Truth):
        return active & condition.value
    return exact_evaluation.mask_at(
        condition, rows, blocks, active, {}, wide=_needs_wide_integers(condition, rows, blocks)
    )


def _seen_keys(blocks: BlockKeys, queries: Int64, n_k: int) -> Int64:
    """Return the keys that each query sees of each block if it selects it: (queries, blocks)."""
    starts, stops = blocks.starts[:-1], blocks.starts[1:]
    if blocks.order is None and blocks.diagonal is not None:
        end = queries[:, None] + blocks.diagonal + 1
        return np.asarray(np.clip(end - starts, 0, stops - starts))
    keys = np.arange(n_k) if blocks.order is None else blocks.order
    before = np.zeros((len(queries), len(keys) + 1), dtype=np.int64)
    np.cumsum(_holds(blocks.rest, queries, keys), axis=1, out=before[:, 1:])
    return np.asarray(before[:, stops] - before[:, starts])


def _needs_wide_integers(condition: ir.Index, rows: Int64, blocks: Int64) -> bool:
    last_row, last_block = (int(x.max()) + 1 if len(x) else 1 for x in (rows, blocks))
    return not fits_word(condition, (0, last_row), (0, last_block))


def _batches(rows: int, keys: int) -> Iterator[slice]:
    step = max(AT_ONCE // max(keys, 1), 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)
