"""Reductions of floating-point values over a range of a variable: Σ, min and max with ends that may differ by pair.

A reduction that depends on one variable of the loops around it is looked up in a table. Any other is made in one of
four ways: as a difference of prefix sums, by adding each term once where the ranges are disjoint, once for all rows or
keys that share their ends, or with a leading dimension for the variable.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import fold
from attnc.compiler.ir.rewrite import renamed, variables
from attnc.compiler.ir.value_nodes import rank, reads
from attnc.runtime.values.masked_reductions import (
    NEUTRAL,
    combine_parts,
    factor_nodes,
    reduce_where,
)
from attnc.runtime.values.pair_blocks import Int64
from attnc.runtime.values.quantity_shapes import (
    append_tensor_dims,
    columns,
    drop_leading_dim,
    select_positions,
)
from attnc.runtime.values.scaled import Quantity
from attnc.runtime.values.sums import (
    added_up,
    covered,
    numbered,
    ranges,
)
from attnc.runtime.values.tabulated import tabulated
from attnc.runtime.values.widths import Widths

if TYPE_CHECKING:
    from attnc.runtime.values.block_values import BlockValues

AT_ONCE = 1 << 23
"""Maximum number of terms of a reduction that are computed at once, over all pairs."""


def reduce_range(values: BlockValues, node: ir.ValueReduce) -> Quantity:
    """Reduce over a range by the cheapest way that applies."""
    table = tabulated(values, node)
    if table is not None:
        return table
    low, high = values.integers(node.low), values.integers(node.high)
    active = values.active(node.low) & values.active(node.high) & (low < high)
    if not active.any():
        return _empty_reduction(values, node)
    first = int(np.where(active, low, np.iinfo(np.int64).max).min())
    last = int(np.where(active, high, np.iinfo(np.int64).min).max())
    low, high = (np.where(active, end, first) for end in (low, high))
    if _takes_prefix_sums(values, node, low, high):
        return _difference_of_prefix_sums(values, node, low, high, first, last)
    disjoint = _sum_disjoint_ranges(values, node, low, high, first, last)
    if disjoint is not None:
        return disjoint
    shared = _reduce_distinct_ranges(values, node, low, high)
    if shared is not None:
        return shared
    return _reduce_in_loop(values, node, low, high)


def _empty_reduction(values: BlockValues, node: ir.ValueReduce | ir.VisibleReduce) -> Tensor:
    """Return the reduction over no terms."""
    value = values.constant(NEUTRAL[node.op])
    return append_tensor_dims(value, rank(node)).expand(*value.shape, *_widths(values, node.body))


def _widths(values: BlockValues, node: ir.Value) -> tuple[int, ...]:
    """Return the sizes of a vector or matrix without computing its value."""
    operands = values.operands
    tensors = (("q", operands.q), ("k", operands.k), ("v", operands.v))
    vectors = {name: x[0].shape[-1] for name, x in tensors if len(x)}
    return Widths(vectors, {name: x.shape for name, x in operands.inputs.items()}, values.integer).of(node)


def _is_unconditional(node: ir.ValueReduce) -> bool:
    """Check that a reduction has no condition on its terms."""
    return isinstance(node.condition, ir.Truth) and node.condition.value


# --- sums whose terms depend on their variable alone ---


def _takes_prefix_sums(values: BlockValues, node: ir.ValueReduce, low: Int64, high: Int64) -> bool:
    """Check that a reduction sums numbers that depend on its variable alone, over a range for each pair."""
    depends_on_pair = bool({"q", "k"} & reads(node.body))
    if node.op != "sum" or not _is_unconditional(node) or rank(node) or values.loops.depth or depends_on_pair:
        return False
    terms = max(low.size, high.size) * int((high - low).max())
    exponentials = any(isinstance(part, ir.Apply) and part.op == "exp" for part in node.body.below)
    return max(low.size, high.size) > 1 and not (exponentials and terms <= AT_ONCE)


def _difference_of_prefix_sums(
    values: BlockValues, node: ir.ValueReduce, low: Int64, high: Int64, first: int, last: int
) -> Tensor:
    """Compute a sum as the difference of two prefix sums over the range's terms, in fp64."""
    block, rows = values.block, np.arange(first, last)
    heads = len(block.heads) if values.differs_by_head(reads(node.body)) else 1
    used = np.ones(len(rows), np.bool_) if isinstance(node.body, ir.Element) else covered(low, high, first, last)
    active = np.broadcast_to(used[None, :, None], (heads, len(rows), 1))
    inner = values.on_block(
        replace(block, rows=rows, keys=block.keys[:1], active=active, running=True, visible=None),
        replace(values.operands, dtype=torch.float64),
    )
    terms = inner.of(renamed(node.body, node.var, fold.place("q")))
    terms = terms.expand(heads, len(rows), 1)[..., 0]
    ends = values.tensor(low - first), values.tensor(high - first)
    return ranges(terms, *ends).to(values.operands.dtype)


def _sum_disjoint_ranges(
    values: BlockValues, node: ir.ValueReduce, low: Int64, high: Int64, first: int, last: int
) -> Tensor | None:
    """Sum over disjoint ranges by adding each term once; None where the ranges overlap or the terms differ by pair."""
    large = any(
        isinstance(part, ir.VisibleReduce) or (isinstance(part, ir.Apply) and part.op == "exp")
        for part in node.body.below
    )
    depends_on_pair = bool({"q", "k"} & reads(node.body))
    if node.op != "sum" or not _is_unconditional(node) or large or values.loops.depth or depends_on_pair:
        return None
    low, high = np.broadcast_arrays(low, high)
    pairs, count = low.shape, prod(low.shape[1:])
    if count * int((high - low).max()) <= 2 * (last - first):
        return None
    ends = zip(low.reshape(-1, count), high.reshape(-1, count), strict=True)
    numbers = [number for number in (numbered(a, b, first, last) for a, b in ends) if number is not None]
    if len(numbers) < len(low):
        return None
    block, rows = values.block, np.arange(first, last)
    heads = len(block.heads) if values.differs_by_head(reads(node.body)) else 1
    active = np.any([number < count for number in numbers], 0)
    active = np.broadcast_to(active[None, :, None], (heads, len(rows), 1))
    inner = values.on_block(replace(block, rows=rows, keys=block.keys[:1], active=active, running=True, visible=None))
    terms = inner.of(renamed(node.body, node.var, fold.place("q")))[:, :, 0]
    terms = terms.expand(max(heads, pairs[0]), *terms.shape[1:])
    terms = torch.where(append_tensor_dims(values.tensor(active[..., 0]), rank(node)), terms, 0)
    sums = added_up(terms, values.tensor(np.array(numbers)), count)
    return sums.reshape(len(sums), *pairs[1:], *terms.shape[2:])


# --- rows or keys that share a range ---


def _reduce_distinct_ranges(values: BlockValues, node: ir.ValueReduce, low: Int64, high: Int64) -> Quantity | None:
    """Reduce once for all rows, or keys, with the same ends; None where the terms differ by row and by key."""
    if values.loops.depth or any(isinstance(part, ir.VisibleReduce) for part in node.body.below):
        return None
    read = reads(node.body) | reads(node.condition)
    for axis, name in ((-1, "k"), (-2, "q")):
        if name in read or max(low.shape[axis], high.shape[axis]) < 2:
            continue
        ends = np.concatenate([columns(end, axis) for end in np.broadcast_arrays(low, high)])
        _, representatives, group = np.unique(ends, axis=1, return_index=True, return_inverse=True)
        if len(representatives) < ends.shape[1]:
            value = _reduce_loop(_representatives(values, axis, representatives, group.reshape(-1)), node)
            return select_positions(value, axis, values.tensor(group.reshape(-1)))
    return None


def _representatives(values: BlockValues, axis: int, representatives: Int64, group: Int64) -> BlockValues:
    """Return values over one representative row or key per group."""
    block = values.block
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(representatives)))
    active = np.logical_or.reduceat(np.take(block.active, order, axis), starts, axis)
    part = replace(block, active=active, visible=None)
    if axis == -1:
        part = replace(part, keys=block.keys[representatives])
    else:
        part = replace(part, rows=block.rows[representatives])
    vectors = {name: x for name, x in values.vectors.items() if (name == "q") == (axis == -1)}
    return values.on_block(part, vectors=vectors)


def _reduce_loop(values: BlockValues, node: ir.ValueReduce) -> Quantity:
    """Reduce over a range with a leading dimension for its variable."""
    low, high = values.integers(node.low), values.integers(node.high)
    active = values.active(node.low) & values.active(node.high) & (low < high)
    if not active.any():
        return _empty_reduction(values, node)
    first = int(np.where(active, low, np.iinfo(np.int64).max).min())
    return _reduce_in_loop(values, node, *(np.where(active, end, first) for end in (low, high)))


# --- a leading dimension for the variable ---


def _reduce_in_loop(values: BlockValues, node: ir.ValueReduce, low: Int64, high: Int64) -> Quantity:
    """Reduce with a leading dimension for the variable, in parts where all terms exceed AT_ONCE."""
    count, low = int((high - low).max()), _without_constant_dims(low)
    step = max(1, AT_ONCE // max(_term_size(values, node, low, high), 1))
    parts = [_reduce_part(values, node, low, high, i, min(i + step, count)) for i in range(0, count, step)]
    return combine_parts(node.op, parts)


def _without_constant_dims(low: Int64) -> Int64:
    """Shrink every dimension along which the first terms are alike to size one: the variable takes the same values."""
    for axis, size in enumerate(low.shape):
        first = low.take([0], axis)
        if size > 1 and (low == first).all():
            low = first
    return low


def _term_size(values: BlockValues, node: ir.ValueReduce, low: Int64, high: Int64) -> int:
    """Return the number of entries of the largest factor of one term, over all pairs."""
    width = max(values.operands.q[0].shape[-1], 1)
    ends = np.broadcast_shapes(low.shape, high.shape)
    sizes = []
    for factor in factor_nodes(node.body) if node.op == "sum" else [node.body]:
        sizes.append(_pair_count(values, factor, node.var, ends) * int(width ** max(rank(factor), 1)))
        if isinstance(factor, ir.Dot):  # a matrix product, where one side alone runs with the variable
            sides = [x for x in (factor.left, factor.right) if node.var in variables(cast("ir.Index", x))]
            if len(sides) == 1:
                sizes[-1] = max(sizes[-1] // width, _pair_count(values, sides[0], node.var, ends) * width)
    return max(sizes)


def _pair_count(values: BlockValues, factor: ir.Value, variable: ir.Var, ends: tuple[int, ...]) -> int:
    """Return for how many pairs a factor of a term has a value of its own."""
    pairs = values.active(factor).shape
    return prod(np.broadcast_shapes(pairs, ends) if variable in variables(cast("ir.Index", factor)) else pairs)


def _reduce_part(values: BlockValues, node: ir.ValueReduce, low: Int64, high: Int64, start: int, stop: int) -> Quantity:
    """Reduce the terms `low + start` to `low + stop` of each pair."""
    steps = np.arange(start, stop).reshape(-1, *[1] * values.pair_dims)
    loops = values.loops.inside(node.var, low[None] + steps)
    inside = values.active(node)[None] & (steps < (high - low)[None])
    inner = values.in_loop(loops, inside)
    if not _is_unconditional(node):
        inside = inside & inner.holds(node.condition)
        inner = inner.over(inside)
    return drop_leading_dim(reduce_where(inner, node.op, node.body, inside, 0))
