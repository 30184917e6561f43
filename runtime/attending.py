"""One attention on a block that has all keys which its rows see: what the reference computes, and the row executor."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.value_nodes import rank
from attnc.runtime.block_values import BlockValues
from attnc.runtime.scaled import plain
from attnc.runtime.vector_math import settle

settle()


def attend(values: BlockValues, node: ir.Attend) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the rows of a block: (heads or 1, rows or 1[, width]) and (heads or 1, rows), None for no softmax.

    A row that sees nothing has out 0 and lse -inf.
    """
    if node.stack is None:
        return _attended(values, node)
    variable, low, high = node.stack
    ends = values.integer(low), values.integer(high)
    out, _ = _attended(values.looped(variable, *ends), node)
    return out.expand(ends[1] - ends[0], *out.shape[1:]).movedim(0, -1), None


def _attended(values: BlockValues, node: ir.Attend) -> tuple[Tensor, Tensor | None]:
    keys = -1 - rank(node.value)
    if not isinstance(node.weights, ir.Softmax):
        weights = values.quantity(node.weights)
        return plain(values.weighted(weights, node.value)).squeeze(keys), None
    seen = values.visible()
    score = torch.where(seen, values.of(node.score), -torch.inf)
    seen = seen.expand(score.shape)
    most = score.detach().amax(-1, keepdim=True)
    most = torch.where(most == -torch.inf, 0, most)
    weights = torch.where(seen, torch.exp(torch.where(seen, score, 0) - most), 0)
    whole = weights.sum(-1, keepdim=True)
    if node.weights.extra is not None:
        logit = values.logit(node.weights.extra)[..., None]
        higher = torch.maximum(most, torch.where(logit.isfinite(), logit, most)).detach()
        shrink = torch.exp(most - higher)
        weights, whole = weights * shrink, whole * shrink + torch.exp(logit - higher)
        most = higher
    out = plain(values.weighted(weights, node.value)).squeeze(keys)
    blind = ~seen.any(-1, keepdim=True) | (whole == 0)  # nothing is seen, or every score is -inf
    divisor = torch.where(blind, 1, whole)[..., 0]
    out = out / (divisor[..., None] if rank(node.value) else divisor)
    lse = torch.log(divisor) + most[..., 0]
    return out, torch.where(blind[..., 0], -torch.inf, lse)


def widened(out: Tensor, heads: int, rows: int, node: ir.Attend) -> Tensor:
    """What `attend` gave, for every head and row."""
    width = out.shape[2:] if rank(node.value) or node.stack is not None else ()
    return out.expand(heads, rows, *width)
