"""Attention whose scores are not `scale * dot(q, k)`, on a CPU, differentiable once.

The kernel computes a score that is a multiple of `dot(q, k)` plus a bias, with the bias as its mask, and its gradients
if no floating-point input needs one. Torch computes all others: dS = P ∘ (dO Vᵀ − rowsum(dO ∘ out) + dLSE) with
P = exp(S − LSE), and S's `derivatives`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.runtime.executors.cpu import flash_kernel
from attnc.runtime.executors.cpu.block_scores import LARGE, Pairs, Scores, with_extra
from attnc.runtime.executors.cpu.block_work import BlockOperands, BlockResults, Gradients, InTorch, RowData
from attnc.runtime.executors.cpu.planned_call import PlannedCall
from attnc.runtime.executors.cpu.row_attention import by_blocks, in_torch
from attnc.runtime.executors.cpu.row_blocks import RowBlock
from attnc.runtime.fallbacks import COPY, note


def attend(q: Tensor, k: Tensor, v: Tensor, call: PlannedCall, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) with custom scores or extra logits, differentiable once in q, k, v and `inputs`."""
    return by_blocks(q, k, v, call, inputs, _by_scores)


def _by_scores(call: PlannedCall, q: Tensor, k: Tensor, inputs: Sequence[Tensor]) -> ByScores:
    scores = Scores(call.relations, call.operands(q.unbind(0), k.unbind(0), (), inputs))
    trains = any(x.requires_grad for x in inputs)
    return ByScores(scores, None if trains else scores.factor, in_torch(call, q, k, inputs))


@dataclass(frozen=True)
class ByScores:
    """The work of a softmax over tokens, applied to v, whose scores depend on their query and key alone.

    `kernel_factor`: the factor of `dot(q, k)` if the kernel computes the gradients. `general`: the work for rows that
    are not finite.
    """

    scores: Scores
    kernel_factor: float | None
    general: InTorch
    least_rows: int = 256
    keeps_results: bool = True

    @property
    def node(self) -> ir.Attend:
        """The attention."""
        return self.scores.node

    def vectors(self, x: Tensor) -> Tensor:
        """Return q, k or v as the kernel takes them, or in the dtype of values."""
        return x if self.scores.factor is not None else self.general.vectors(x)

    def computed(self, block: RowBlock, leaves: BlockOperands) -> BlockResults:
        """Compute the results of a block."""
        q, k, v = _squeezed(leaves)
        factor = self.scores.factor
        score = self.scores.of(block, q, k) if factor is None else self.scores.bias(block)
        row_max = score.amax(-1)
        large = row_max.isfinite() & (row_max.abs() > LARGE)
        shift = None
        if large.any():
            shift = torch.where(large, row_max, 0)
            score = score - shift[..., None]
            shift = shift.expand(len(block.heads), -1)
        pair = _softmax(score, v) if factor is None else _by_kernel(q, k, v, score, factor)
        results = BlockResults(*pair, shift)
        return results if self.scores.extra_logit is None else with_extra(self.scores, block, q, results)

    def recomputed(self, block: RowBlock, leaves: BlockOperands) -> BlockResults:
        """Compute the results of a part in torch: the kernel is undefined if a visible score is -inf."""
        own = {name: self.general.vectors(x) for name, x in leaves.own.items()}
        return self.general.computed(block, BlockOperands(own, leaves.whole, leaves.inputs))

    def prepared(self, rows: RowData) -> RowData:
        """Return the row data with zeros for what is missing, in which rows that see no key contribute nothing."""
        assert rows.out is not None and rows.lse is not None
        if rows.grad_lse is not None and self.kernel_factor is not None:
            note(
                self.general.relations.pattern.name,
                COPY,
                "the gradient of the LSE widens q, k, v, out and its gradient",
            )
        grad_out = torch.zeros_like(rows.out) if rows.grad_out is None else rows.grad_out
        lse, grad_out, grad_lse = flash_kernel.without_blind_rows(rows.lse, grad_out, rows.grad_lse)
        return RowData(grad_out, grad_lse, rows.out, lse, torch.zeros_like(lse) if rows.shift is None else rows.shift)

    def gradients(self, block: RowBlock, leaves: BlockOperands, rows: RowData) -> Gradients:
        """Compute the gradients of a block from the results of its rows."""
        assert rows.lse is not None
        inputs = [x for x in leaves.inputs if x.requires_grad]
        q, k, v = _squeezed(leaves)
        with torch.enable_grad():
            q_leaf, k_leaf = (x.detach().to(rows.lse.dtype).requires_grad_() for x in (q, k))
        pairs: Pairs = []
        if self.kernel_factor is not None:
            gradients = self._by_kernel_backward(block, (q, k, v), rows, self.kernel_factor)
        else:
            gradients, pairs = self._in_torch_backward(block, (q_leaf, k_leaf, v.to(rows.lse.dtype)), rows)
        pairs += self._extra_pairs(block, q_leaf, rows)
        if pairs:
            atoms, grads = zip(*pairs, strict=True)
            more = torch.autograd.grad(atoms, [q_leaf, k_leaf, *inputs], grads, allow_unused=True)
            of_q, of_k = (_summed(*both) for both in zip(gradients[:2], more[:2], strict=True))
            gradients = [of_q, of_k, gradients[2], *more[2:]]
        elif inputs:
            gradients = [*gradients, *[None] * len(inputs)]
        dq, dk, dv, *of_inputs = gradients
        return (
            None if dq is None else dq[:, :, None],
            *(None if x is None else x[:, None] for x in (dk, dv)),
            *of_inputs,
        )

    def _by_kernel_backward(
        self, block: RowBlock, vectors: tuple[Tensor, Tensor, Tensor], rows: RowData, factor: float
    ) -> list[Tensor | None]:
        """Compute the gradients of q, k and v where the score is `factor * dot(q, k)` plus a bias."""
        q, k, v = vectors
        grad_out, grad_lse, out, lse, shift = rows
        assert grad_out is not None and out is not None and lse is not None and shift is not None
        widths = [x.shape[-1] for x in vectors]
        grad_out, out = grad_out.to(q.dtype), out.to(q.dtype)
        if grad_lse is not None:
            grad_out, q, k, v, out = flash_kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
        width = max(q.shape[-1], v.shape[-1])
        grad_out, q, k, v, out = (flash_kernel.padded(x, width)[None] for x in (grad_out, q, k, v, out))
        bias = self.scores.bias(block)
        bias = bias - shift[..., None] if shift.any() else bias
        grads = flash_kernel.attend_backward(grad_out, q, k, v, out, lse[None], bias[None], False, factor)
        return [x[0, ..., :width] for x, width in zip(grads, widths, strict=True)]

    def _in_torch_backward(
        self, block: RowBlock, vectors: tuple[Tensor, Tensor, Tensor], rows: RowData
    ) -> tuple[list[Tensor | None], Pairs]:
        """Compute the gradient of v, and the gradients of the atoms of the scores."""
        q, k, v = vectors
        assert rows.grad_out is not None and rows.lse is not None and rows.shift is not None
        grad_out = rows.grad_out.to(v.dtype)
        score, pull = self.scores.recorded(block, q, k, rows.shift)
        weights = torch.exp(score - rows.lse[..., None])
        change = weights * (grad_out @ v.transpose(-1, -2) - _delta(rows)[..., None])
        return [None, None, weights.transpose(-1, -2) @ grad_out], pull(change)

    def _extra_pairs(self, block: RowBlock, q: Tensor, rows: RowData) -> Pairs:
        """Return the extra logits, whose values are 0, with their gradients: -P_extra ∘ (rowsum(dO ∘ out) - dLSE)."""
        if self.scores.extra_logit is None:
            return []
        assert rows.lse is not None and rows.shift is not None
        with torch.enable_grad():
            logit = self.scores.extra(block, q)
        if not logit.requires_grad:
            return []
        return [(logit, -torch.exp(logit.detach() - rows.shift - rows.lse) * _delta(rows))]


def _squeezed(leaves: BlockOperands) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (heads, rows, dk), k (heads, keys, dk) and v (heads, keys, dv) of a block."""
    return leaves.own["q"][:, :, 0], leaves.own["k"][:, 0], leaves.own["v"][:, 0]


def _summed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _delta(rows: RowData) -> Tensor:
    """Compute rowsum(dO ∘ out) - dLSE."""
    assert rows.grad_out is not None and rows.out is not None and rows.lse is not None
    delta = (rows.grad_out.to(rows.lse.dtype) * rows.out.to(rows.lse.dtype)).sum(-1)
    return delta if rows.grad_lse is None else delta - rows.grad_lse


def _softmax(score: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) of scores (…, rows, keys) over v (…, keys, dv)."""
    row_max = score.amax(-1, keepdim=True)
    weights = torch.exp(score - torch.where(row_max == -math.inf, 0, row_max))
    row_sum = weights.sum(-1)
    # NaN stays NaN: such a row is not blind.
    lse = torch.where(row_sum == 0, -math.inf, row_max[..., 0] + row_sum.log())
    return (weights @ v) / torch.where(row_sum == 0, 1, row_sum)[..., None], lse


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) of the scores `factor * dot(q, k) + bias`."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, wide = (flash_kernel.padded(x, width)[None] for x in (q, k, v))
    out, lse = flash_kernel.attend(q, k, wide, bias[None], False, factor)
    blind = (bias == -math.inf).all(-1)
    return out[0, ..., : v.shape[-1]].masked_fill(blind[..., None], 0), lse[0].masked_fill(blind, -math.inf)
