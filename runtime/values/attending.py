"""One attention on a block that holds all keys visible to its rows, for the reference and the row executor."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import rank
from attnc.runtime.process.vector_math import settle
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.scaled import plain

settle()


def attend(values: BlockValues, node: ir.Attend) -> tuple[Tensor, Tensor | None]:
    """Return (out, lse) of a block's rows: (heads or 1, rows or 1[, width]) and (heads or 1, rows) or None.

    lse is None for weights that are not a softmax. A row that sees nothing has out 0 and lse -inf.
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
    visible = values.visible()
    score = torch.where(visible, values.of(node.score), -torch.inf)
    visible = visible.expand(score.shape)
    row_max = score.detach().amax(-1, keepdim=True)
    row_max = torch.where(row_max == -torch.inf, 0, row_max)
    weights = torch.where(visible, torch.exp(torch.where(visible, score, 0) - row_max), 0)
    total = weights.sum(-1, keepdim=True)
    if node.weights.extra is not None:
        logit = values.logit(node.weights.extra)[..., None]
        new_max = torch.maximum(row_max, torch.where(logit.isfinite(), logit, row_max)).detach()
        shrink = torch.exp(row_max - new_max)
        weights, total = weights * shrink, total * shrink + torch.exp(logit - new_max)
        row_max = new_max
    out = plain(values.weighted(weights, node.value)).squeeze(keys)
    blind = ~visible.any(-1, keepdim=True) | (total == 0)  # no visible key, or every score is -inf
    divisor = torch.where(blind, 1, total)[..., 0]
    out = out / (divisor[..., None] if rank(node.value) else divisor)
    lse = torch.log(divisor) + row_max[..., 0]
    return out, torch.where(blind[..., 0], -torch.inf, lse)


def widened(out: Tensor, heads: int, rows: int, node: ir.Attend) -> Tensor:
    """Return the output of `attend`, expanded to every head and row."""
    width = out.shape[2:] if rank(node.value) or node.stack is not None else ()
    return out.expand(heads, rows, *width)
