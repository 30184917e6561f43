"""Conditions on blocks, decided exactly for many blocks at once.

Interval analysis decides what it can. The remaining blocks fall into classes that hold the same relation, and one
member of each class is decided: `and`, `or`, `not`, `if` and short `any` and `all` part by part, others by evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis.box_values import FALSE, TRUE, UNKNOWN
from attnc.compiler.analysis.hashing import Hash, combine, mix
from attnc.compiler.analysis.intervals import Ranges, analyse_variables
from attnc.compiler.ir import Bool, Compare, Const, ExactSelect, Index, Linear, Not, Reduce, is_truth
from attnc.compiler.ir.aggregates import TooManyStepsError, spend
from attnc.compiler.ir.array_evaluator import ONE_LANE, ArrayEvaluator, PointBatch
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

Bools = NDArray[np.bool_]
Int64 = NDArray[np.int64]
Origins = Mapping[Index, Span]

MOST_BLOCKS = 64
"""Maximum number of blocks of a box that is decided block by block."""

MOST_LANES = 1 << 18
"""Maximum number of lanes over which one aggregate is spread at a time."""

MOST_KNOWN = 1 << 16
"""Maximum number of classes that are remembered for one relation, at about a hundred bytes each."""

_KNOWN: WeakKeyDictionary[Index, dict[int, bool]] = WeakKeyDictionary()
"""Decisions by class, kept because portions of boxes share classes. Dropped with the relation, and when full."""


def refine(keep: Index, ranges: Ranges, found: NDArray[np.int8]) -> tuple[NDArray[np.int8], Hash]:
    """Return states and class keys of boxes given by ranges of units; open boxes of few blocks are decided exactly."""
    shape = np.broadcast_shapes(found.shape, *(low.shape for low, _ in ranges.values()))
    sizes = [np.broadcast_to(high - low + 1, shape) for low, high in ranges.values()]
    state, key = np.broadcast_to(found, shape).copy(), np.zeros(shape, dtype=np.uint64)
    blocks = _product(sizes)
    few = (state == UNKNOWN) & (blocks <= MOST_BLOCKS)
    if few.any():
        _decide_boxes(keep, ranges, sizes, np.flatnonzero(few), state, key)
    if (key[state == UNKNOWN] == 0).any():
        key = np.where(key == 0, analyse_variables(ranges, refine=refine).truth(keep).key, key)
    return state, key


def _decide_boxes(
    keep: Index, ranges: Ranges, sizes: list[Int64], box: Int64, state: NDArray[np.int8], key: Hash
) -> None:
    """Fill in the states and keys of boxes, block by block; where any block has a fault, leave all unchanged."""
    count = _product(sizes)[box]
    starts = np.cumsum(count) - count
    box_of_block = np.repeat(box, count)
    within = np.arange(len(box_of_block)) - np.repeat(starts, count)
    decisions = _KNOWN.setdefault(keep, {})
    if len(decisions) > MOST_KNOWN:
        _KNOWN[keep] = decisions = {}  # a new dict, because another thread may be reading the old one
    try:
        values = decide(keep, _lanes(ranges, sizes, box_of_block, within), {}, decisions)
    except EvaluationError:
        return
    kept = np.add.reduceat(values.astype(np.int64), starts)
    state[box] = np.where(kept == count, TRUE, np.where(kept == 0, FALSE, UNKNOWN))
    pattern = np.add.reduceat(np.where(values, mix(within), np.uint64(0)), starts)
    key[box] = combine(pattern, *(mix(size[box].astype(np.int64)) for size in sizes)) | np.uint64(1)


def _product(sizes: list[Int64]) -> Int64:
    """The number of blocks in each box, capped just above `MOST_BLOCKS` so that no product overflows."""
    total = np.ones_like(sizes[0])
    for size in sizes:
        total = np.minimum(total, MOST_BLOCKS + 1) * np.minimum(size, MOST_BLOCKS + 1)
    return total


def _lanes(ranges: Ranges, sizes: list[Int64], box_of_block: Int64, within: Int64) -> PointBatch:
    """Return a batch with a lane for each block of each box."""
    variables = {}
    for (variable, (low, _)), size in zip(ranges.items(), sizes, strict=True):
        variables[variable] = np.broadcast_to(low, size.shape)[box_of_block] + within % size[box_of_block]
        within = within // size[box_of_block]
    zeros = np.zeros(len(box_of_block), dtype=np.int64)
    return PointBatch(variables, zeros, zeros)


def decide(node: Index, lanes: PointBatch, origins: Origins, known: dict[int, bool] | None = None) -> Bools:
    """Decide a condition in every lane. Raises EvaluationError on a fault.

    `known` holds earlier decisions by class; new decisions are added to it.
    """
    if not len(lanes):
        return np.zeros(0, dtype=np.bool_)
    analysis = analyse_variables(
        {variable: (value, value) for variable, value in lanes.variables.items()}, refine=refine
    )
    truths = analysis.truth(node)
    state = np.broadcast_to(truths.state, len(lanes))
    result = np.asarray(state == TRUE)
    (undecided,) = np.nonzero(state == UNKNOWN)
    if len(undecided):
        keys = np.broadcast_to(truths.key, len(lanes))[undecided]
        distinct, first, number = np.unique(keys, return_index=True, return_inverse=True)
        values = _remembered(distinct.tolist(), known)
        (new,) = np.nonzero(values < 0)
        if len(new):
            values[new] = _resolved(node, lanes.take(undecided[first[new]]), origins, analysis.saturated)
        if known is not None:
            known.update(zip(distinct[new].tolist(), values[new].astype(bool).tolist(), strict=True))
        result[undecided] = values[number] > 0
    return result


def _remembered(keys: list[int], known: dict[int, bool] | None) -> NDArray[np.int8]:
    """Return the remembered decision for each class: 1, 0, or -1 for an undecided class."""
    return np.array([-1 if known is None else known.get(key, -1) for key in keys], dtype=np.int8)


def _resolved(node: Index, lanes: PointBatch, origins: Origins, wide: bool) -> Bools:
    """Decide a condition in lanes that all belong to different classes."""
    match node:
        case Bool():
            return _junction(node, lanes, origins)
        case Not():
            return ~decide(node.operand, lanes, origins)
        case ExactSelect():
            condition = decide(node.condition, lanes, origins)
            result = np.zeros(len(lanes), dtype=np.bool_)
            result[condition] = decide(node.then, lanes.take(condition), origins)
            result[~condition] = decide(node.otherwise, lanes.take(~condition), origins)
            return result
        case Compare() if not wide:
            value = _number(node.value, lanes, origins)
            return value >= 0 if node.op == "ge" else value == 0
        case Reduce():
            return _spread(node, lanes, origins, wide) > 0
        case _:
            return np.asarray(values_at(node, lanes, origins, wide=wide), dtype=np.bool_)


def _junction(node: Bool, lanes: PointBatch, origins: Origins) -> Bools:
    conjunction = node.op == "and"
    result = np.full(len(lanes), conjunction)
    for operand in node.operands:
        (undecided,) = np.nonzero(result == conjunction)
        result[undecided] = decide(operand, lanes.take(undecided), origins)
    return result


def _number(node: Index, lanes: PointBatch, origins: Origins) -> Int64:
    """Evaluate an integer in lanes where no step exceeds 64 bits."""
    match node:
        case Linear():
            total = np.full(len(lanes), node.constant, dtype=np.int64)
            for term, coefficient in node.terms:
                total += coefficient * _number(term, lanes, origins)
            return total
        case Reduce(op="sum"):
            return _spread(node, lanes, origins, wide=False)
        case _:
            return values_at(node, lanes, origins, wide=False)


def _spread(node: Reduce, lanes: PointBatch, origins: Origins, wide: bool) -> Int64:
    """Evaluate an aggregate of aggregates with a lane for each value of its variable; evaluate any other directly.

    An aggregate with a fault in some lane is also evaluated directly: the fault counts only if evaluation, which stops
    once the result is known, reaches it.
    """
    if wide or not _spreads(node):
        return values_at(node, lanes, origins, wide=wide)
    low, high = (_number(end, lanes, origins) for end in (node.low, node.high))
    count = np.maximum(high - low, 0)
    if count.sum() > MOST_LANES and len(lanes) > 1:
        half = len(lanes) // 2
        parts = (lanes.take(slice(None, half)), lanes.take(slice(half, None)))
        return np.concatenate([_spread(node, part, origins, wide) for part in parts])
    try:
        return _collected(node, lanes, low, count, origins)
    except TooManyStepsError:
        raise
    except EvaluationError:
        return values_at(node, lanes, origins, wide=wide)


def _spreads(node: Reduce) -> bool:
    """Whether an aggregate's body is a condition, or a choice of constants by one, that contains another aggregate."""
    return (is_truth(node) or _counts(node) is not None) and any(isinstance(n, Reduce) for n in node.body.below)


def _counts(node: Reduce) -> tuple[Index, int, int] | None:
    """The condition and the two numbers of a sum of `yes if condition else no`; None for other aggregates."""
    match node:
        case Reduce(op="sum", body=ExactSelect(condition=condition, then=Const(value=yes), otherwise=Const(value=no))):
            return condition, yes, no
        case _:
            return None


def _collected(node: Reduce, lanes: PointBatch, low: Int64, count: Int64, origins: Origins) -> Int64:
    spend(node, 1, int(count.sum()), origins, wide=False)
    lane = np.repeat(np.arange(len(lanes)), count)
    i = np.arange(len(lane)) - np.repeat(np.cumsum(count) - count, count) + low[lane]
    inner = lanes.take(lane, {node.var: i})
    (inside,) = np.nonzero(decide(node.condition, inner, origins))
    lane, inner = lane[inside], inner.take(inside)
    counts = _counts(node)
    if counts is None:
        values = decide(node.body, inner, origins) == (node.op == "any")
        decisive = np.bincount(lane[values], minlength=len(lanes)) > 0
        return np.asarray(decisive if node.op == "any" else ~decisive, dtype=np.int64)
    condition, yes, no = counts
    holding = np.bincount(lane[decide(condition, inner, origins)], minlength=len(lanes))
    return holding * yes + (np.bincount(lane, minlength=len(lanes)) - holding) * no


def values_at(
    node: Index,
    lanes: PointBatch,
    origins: Mapping[Index, Span] | None = None,
    *,
    wide: bool,
) -> NDArray[Any]:
    """Evaluate an integer or a condition that reads variables, in every lane.

    Raises EvaluationError on a fault.
    """
    if not len(lanes):
        return np.zeros(0, dtype=np.int64)
    evaluator = ArrayEvaluator(lanes.q[None], lanes.k[None], wide, origins or {}, decide=decide)
    for variable, value in lanes.variables.items():
        evaluator.bind(variable, value[None])
    result = evaluator.truth(node, ONE_LANE) if is_truth(node) else evaluator.integer(node, ONE_LANE)
    return np.asarray(np.broadcast_to(result, (1, len(lanes)))[0])
