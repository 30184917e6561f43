"""Conditions on blocks, decided exactly for many at once.

Interval analysis goes first. What it leaves open falls into classes that hold the same relation, of which one member
each is decided: `and`, `or`, `not`, `if` and short `any` and `all` part by part, the rest by evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnc.compiler.analysis import exact
from attnc.compiler.analysis.exact import Lanes
from attnc.compiler.analysis.hashing import combine, mix
from attnc.compiler.analysis.intervals import FALSE, TRUE, UNKNOWN, Ranges, Truths, analyse_variables
from attnc.compiler.ir import Bool, Choice, Index, Not, Reduce
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

Bools = NDArray[np.bool_]
Int64 = NDArray[np.int64]
Origins = Mapping[Index, Span]

MOST_BLOCKS = 64
"""A box that touches more blocks than this is not decided block by block."""

SHORT = 64
"""`any` and `all` over this many values on average are taken apart."""


def refine(keep: Index, ranges: Ranges, found: Truths) -> Truths:
    """States and keys of boxes given by ranges of units: those open that touch few blocks are decided exactly."""
    shape = np.broadcast_shapes(found.state.shape, found.key.shape, *(low.shape for low, _ in ranges.values()))
    sizes = [np.broadcast_to(high - low + 1, shape) for low, high in ranges.values()]
    blocks = np.minimum.reduce([np.full(shape, MOST_BLOCKS + 1), _product(sizes)])
    state, key = np.broadcast_to(found.state, shape).copy(), np.broadcast_to(found.key, shape).copy()
    box = np.flatnonzero((state == UNKNOWN) & (blocks <= MOST_BLOCKS))
    if not len(box):
        return found
    count = blocks[box]
    starts = np.cumsum(count) - count
    of_box = np.repeat(box, count)
    within = np.arange(len(of_box)) - np.repeat(starts, count)
    try:
        values = decide(keep, _lanes(ranges, sizes, of_box, within), {})
    except EvaluationError:
        return found
    kept = np.add.reduceat(values.astype(np.int64), starts)
    state[box] = np.where(kept == count, TRUE, np.where(kept == 0, FALSE, UNKNOWN))
    drawn = np.add.reduceat(np.where(values, mix(within), np.uint64(0)), starts)
    key[box] = combine(drawn, *(mix(size[box].astype(np.int64)) for size in sizes))
    return Truths(state, key)


def _product(sizes: list[Int64]) -> Int64:
    """The number of blocks, cut off above `MOST_BLOCKS` so that no product overflows."""
    total = np.ones_like(sizes[0])
    for size in sizes:
        total = np.minimum(total, MOST_BLOCKS + 1) * np.minimum(size, MOST_BLOCKS + 1)
    return total


def _lanes(ranges: Ranges, sizes: list[Int64], of_box: Int64, within: Int64) -> Lanes:
    """A lane for each block of each box."""
    variables = {}
    for (variable, (low, _)), size in zip(ranges.items(), sizes, strict=True):
        variables[variable] = np.broadcast_to(low, size.shape)[of_box] + within % size[of_box]
        within = within // size[of_box]
    nowhere = np.zeros(len(of_box), dtype=np.int64)
    return Lanes(variables, nowhere, nowhere)


def decide(node: Index, lanes: Lanes, origins: Origins) -> Bools:
    """The value of a condition in every lane. Raises EvaluationError on a fault."""
    if not len(lanes):
        return np.zeros(0, dtype=np.bool_)
    analysis = analyse_variables({variable: (value, value) for variable, value in lanes.variables.items()})
    found = analysis.truth(node)
    state = np.broadcast_to(found.state, len(lanes))
    result = state == TRUE
    (open_,) = np.nonzero(state == UNKNOWN)
    if len(open_):
        keys = np.broadcast_to(found.key, len(lanes))[open_]
        _, first, number = np.unique(keys, return_index=True, return_inverse=True)
        result[open_] = _resolved(node, lanes.take(open_[first]), origins, analysis.saturated)[number]
    return result


def _resolved(node: Index, lanes: Lanes, origins: Origins, wide: bool) -> Bools:
    """The value in lanes that are unlike each other."""
    match node:
        case Bool():
            return _junction(node, lanes, origins)
        case Not():
            return ~decide(node.operand, lanes, origins)
        case Choice():
            condition = decide(node.condition, lanes, origins)
            result = np.zeros(len(lanes), dtype=np.bool_)
            result[condition] = decide(node.then, lanes.take(condition), origins)
            result[~condition] = decide(node.otherwise, lanes.take(~condition), origins)
            return result
        case Reduce():
            taken_apart = _quantified(node, lanes, origins, wide)
            return _evaluated(node, lanes, origins, wide) if taken_apart is None else taken_apart
        case _:
            return _evaluated(node, lanes, origins, wide)


def _evaluated(node: Index, lanes: Lanes, origins: Origins, wide: bool) -> Bools:
    return np.asarray(exact.values(node, lanes, origins, wide=wide), dtype=np.bool_)


def _junction(node: Bool, lanes: Lanes, origins: Origins) -> Bools:
    conjunction = node.op == "and"
    result = np.full(len(lanes), conjunction)
    for operand in node.operands:
        (open_,) = np.nonzero(result == conjunction)
        result[open_] = decide(operand, lanes.take(open_), origins)
    return result


def _quantified(node: Reduce, lanes: Lanes, origins: Origins, wide: bool) -> Bools | None:
    """An `any` or `all` with a lane for each value; None where there are many, or where some value is a fault.

    A fault counts only if evaluation, which stops where the answer is known, meets it.
    """
    low, high = (exact.values(end, lanes, origins, wide=wide).astype(np.int64) for end in (node.low, node.high))
    count = np.maximum(high - low, 0)
    if count.sum() > SHORT * len(lanes):
        return None
    lane = np.repeat(np.arange(len(lanes)), count)
    i = np.arange(len(lane)) - np.repeat(np.cumsum(count) - count, count) + low[lane]
    try:
        inner = lanes.take(lane, {node.var: i})
        (inside,) = np.nonzero(decide(node.condition, inner, origins))
        values = decide(node.body, inner.take(inside), origins)
    except EvaluationError:
        return None
    wanted = values if node.op == "any" else ~values
    met = np.bincount(lane[inside][wanted], minlength=len(lanes)) > 0
    return met if node.op == "any" else ~met
