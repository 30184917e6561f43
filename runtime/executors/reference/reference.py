"""The reference executor: dense attention straight from the IR, in any dtype, differentiable as often as torch allows.

It takes O(Nq · Nk) memory, and is the oracle of every other executor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.ir.value_nodes import is_plain
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.values.attending import attend as attend_block
from attnc.runtime.values.attending import widened
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.pair_blocks import Operands, PairBlock
from attnc.runtime.values.widths import of_out


def dense_mask(relations: Relations) -> Tensor:
    """Return the relation of a call: bool (batch or 1, heads or 1, Nq, Nk), on the CPU.

    Raises EvaluationError where the relation faults.
    """
    shape = relations.shape
    n_q, n_k = shape.n_q, shape.n_k
    groups = relations.groups()
    if len(groups) == 1:
        batches, heads, _ = groups[0]
        if len(batches) == shape.batch and len(heads) == shape.heads and batches and heads:
            return torch.from_numpy(relations.mask(0, 0, 0, n_q, 0, n_k))[None, None]
    mask = np.zeros((shape.batch, shape.heads, n_q, n_k), dtype=np.bool_)
    for batches, heads, _ in groups:
        if batches and heads:
            mask[np.ix_(batches, heads)] = relations.mask(batches[0], heads[0], 0, n_q, 0, n_k)
    return torch.from_numpy(mask)


def attend(
    q: Tensor, k: Tensor, v: Tensor, relations: Relations, scale: float, inputs: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of one attention.

    q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv), one dtype → out (B, Hq, Nq, dv), lse (B, Hq, Nq) natural
    log, both fp32 (fp64 for fp64) unless it is a plain softmax, whose out has the dtype of v; lse is NaN where the
    weights are not a softmax. A row without keys: out 0, lse -inf, gradients 0. `inputs`: the real inputs.
    """
    mask = dense_mask(relations).to(q.device)
    if is_plain(relations.pattern.attend):
        return _plain(q, k, v, mask, scale)
    out, lse = _general(q, k, v, relations, scale, inputs or {}, mask)
    return _depending(out, q, k, v, *(inputs or {}).values()), _depending(lse, q, k, *(inputs or {}).values())


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax of `scale * dot(q, k)`."""
    seen = mask.any(-1, keepdim=True)
    group = max(q.shape[1] // max(k.shape[1], 1), 1)
    score = (q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    # A row of -inf alone has NaN gradients: such rows are computed as zeros and dropped at the end.
    score = torch.where(seen, score, torch.zeros((), dtype=score.dtype, device=score.device))
    lse = torch.logsumexp(score.to(_lse_dtype(q.dtype)), -1) if score.shape[-1] else score.sum(-1)
    weights = torch.where(seen, torch.softmax(score, -1), torch.zeros((), dtype=score.dtype, device=score.device))
    out = weights.to(v.dtype) @ v.repeat_interleave(group, 1)
    lse = torch.where(seen[..., 0], lse, torch.full_like(lse, -torch.inf)).to(_lse_dtype(q.dtype))
    return out, lse


def _general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relations: Relations,
    scale: float,
    inputs: Mapping[str, Tensor],
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute any attention, with every window as one block of rows."""
    pattern, dtype = relations.pattern, _lse_dtype(q.dtype)
    node = pattern.attend
    sizes, slices, spaced = relations.sizes, relations.slices, node.keys is not None
    vectors = q.unbind(0), k.unbind(0), v.unbind(0)
    operands = Operands(*vectors, inputs, sizes, slices, scale, dtype, pattern.origins, spaced)
    heads = tuple(range(q.shape[1]))
    mask_array = mask.expand(q.shape[0], q.shape[1], *mask.shape[2:]).cpu().numpy()
    parts: list[tuple[int, slice, Tensor, Tensor | None]] = []
    for batch in range(q.shape[0]):
        for window in relations.windows(batch):
            rows, keys = slice(window.row, window.row + window.n_q), slice(window.key, window.key + window.n_k)
            visible = mask_array[batch, :, rows, keys]
            if not visible.any():
                continue
            block = PairBlock(
                batch, heads, window, np.arange(window.n_q), np.arange(window.n_k), visible, visible=visible
            )
            out, lse = attend_block(BlockValues(operands, block), node)
            parts.append((batch, rows, widened(out, len(heads), window.n_q, node), lse))
    width = parts[0][2].shape[2:] if parts else of_out(relations, {name: x.shape for name, x in inputs.items()})
    result = torch.zeros((*q.shape[:3], *width), dtype=dtype, device=q.device)
    lses = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)
    for batch, rows, out, lse in parts:
        hidden = torch.from_numpy(~mask_array[batch, :, rows].any(-1)).to(q.device)
        zero = torch.zeros((), dtype=dtype, device=q.device)
        result[batch, :, rows] = torch.where(hidden.reshape(*hidden.shape, *[1] * (out.ndim - 2)), zero, out)
        lse_part = torch.full_like(hidden, torch.nan, dtype=dtype) if lse is None else lse.expand(hidden.shape)
        lses[batch, :, rows] = torch.where(hidden, -torch.inf, lse_part)
    return result, lses


class _Depending(torch.autograd.Function):
    """A result that passes gradients, perhaps zeros, to all of its operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(torch.zeros_like(x) if x.is_floating_point() else None for x in ctx.saved_tensors)


def _depending(x: Tensor, *operands: Tensor) -> Tensor:
    return cast("Tensor", _Depending.apply(x, *operands))  # type: ignore[no-untyped-call]


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
