"""Masked reductions of IR values over one pair dimension: sums of products, minima and maxima."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import rank
from attnc.runtime.call.asking import surely_all
from attnc.runtime.values import scaled
from attnc.runtime.values.functions import FUNCTIONS
from attnc.runtime.values.pair_blocks import PairMask
from attnc.runtime.values.quantity_shapes import append_dims, append_tensor_dims
from attnc.runtime.values.scaled import Quantity, plain

if TYPE_CHECKING:
    from attnc.runtime.values.block_values import BlockValues

NEUTRAL = {"sum": 0.0, "min": torch.inf, "max": -torch.inf}
"""The result of each reduction over no terms."""


def reduce_where(values: BlockValues, op: str, body: ir.Value, inside: PairMask, axis: int) -> Quantity:
    """Reduce `body` over one pair dimension where `inside` holds; the dimension stays, of size one."""
    extra = rank(body)
    at = axis - extra if axis < 0 else axis
    mask = append_tensor_dims(values.tensor(inside), extra)
    if op == "sum":
        factors = _factors(values, body, extra)
        return scaled.contracted(factors, _drop_constant_dims(mask, at), at, extra)
    value = values.of(body)
    neutral = torch.full((), NEUTRAL[op], dtype=value.dtype, device=value.device)
    value = torch.where(mask, value, neutral)
    best = value.argmax(at, keepdim=True) if op == "max" else value.argmin(at, keepdim=True)
    return value.gather(at, best)


def combine_parts(op: str, parts: Sequence[Quantity]) -> Quantity:
    """Combine the results of one reduction over consecutive parts of its range."""
    result = parts[0]
    for part in parts[1:]:
        result = scaled.added(result, part) if op == "sum" else FUNCTIONS[op](plain(result), plain(part))
    return result


def factor_nodes(node: ir.Value) -> list[ir.Value]:
    """Return the nodes whose product a value is."""
    if isinstance(node, ir.Apply) and node.op == "mul":
        return [factor for operand in node.operands for factor in factor_nodes(operand)]
    return [node.left, node.right] if isinstance(node, ir.Outer) else [node]


def _factors(values: BlockValues, node: ir.Value, extra: int) -> list[Quantity]:
    """Return the factors of a value, each with `extra` dimensions beyond the pair dimensions."""
    if isinstance(node, ir.Apply) and node.op == "mul":
        return [factor for operand in node.operands for factor in _factors(values, operand, extra)]
    if isinstance(node, ir.Outer):
        return [values.of(node.left)[..., :, None], values.of(node.right)[..., None, :]]
    return [append_dims(values.quantity(node), extra - rank(node))]


def _drop_constant_dims(inside: Tensor, axis: int) -> Tensor:
    """Shrink every dimension but `axis` along which the mask is constant to size one."""
    for i in range(inside.ndim):
        if i == axis % inside.ndim or inside.shape[i] == 1:
            continue
        first = inside.narrow(i, 0, 1)
        if surely_all(inside == first):
            inside = first
    return inside
