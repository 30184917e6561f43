"""Attention to selected blocks where inputs say which tokens a block holds; every head group has its own blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.runtime.executors.cpu import flash_kernel
from attnc.runtime.executors.cpu.autograd import GradientWork, Pair, Triple


@dataclass(frozen=True, eq=False)
class OwnBlocks:
    """A head group and its blocks: the selection, bool (rows, blocks), and the work that attends to it."""

    batch: int
    heads: slice
    kv_heads: slice
    chosen: Tensor
    work: GradientWork

    def of(self, *tensors: Tensor) -> list[Tensor]:
        """Return the head group's slices of q, out or gradients (B, Hq, N, …)."""
        return [x[self.batch : self.batch + 1, self.heads] for x in tensors]

    def of_keys(self, *tensors: Tensor) -> list[Tensor]:
        """Return the head group's slices of k, v or gradients (B, Hkv, N, …)."""
        return [x[self.batch : self.batch + 1, self.kv_heads] for x in tensors]


@dataclass(frozen=True, eq=False)
class SelectedByData:
    """The work of one call, one head group after another."""

    lanes: Sequence[OwnBlocks]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """Compute (out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv)."""
        out = q.new_zeros((*q.shape[:3], v.shape[-1]))
        lse = torch.full(q.shape[:3], -math.inf, dtype=flash_kernel.lse_dtype(q.dtype), device=q.device)
        for head_group in self.lanes:
            (queries,), (keys, values) = head_group.of(q), head_group.of_keys(k, v)
            results = head_group.work.forward(queries, keys, values, [head_group.chosen])
            for total, part in zip(head_group.of(out, lse), results, strict=True):
                total.copy_(part)
        return out, lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """Compute (dq, dk, dv)."""
        q, k, v, out, lse = kept[:5]
        sums = flash_kernel.lse_dtype(q.dtype)
        grad_q = torch.zeros_like(q)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=sums, device=x.device) for x in (k, v))
        for head_group in self.lanes:
            group_q, group_out, group_lse, group_grad = head_group.of(q, out, lse, grad_out)
            group_tensors = [group_q, *head_group.of_keys(k, v), group_out, group_lse, head_group.chosen]
            of_lse = None if grad_lse is None else head_group.of(grad_lse)[0]
            dq, dk, dv = head_group.work.backward(group_grad, of_lse, group_tensors)
            head_group.of(grad_q)[0].copy_(dq)
            for total, part in zip(head_group.of_keys(grad_k, grad_v), (dk, dv), strict=True):
                total.add_(part)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
