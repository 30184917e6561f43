"""Attention to chosen places where inputs tell which tokens a place has: each head has places of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.runtime.cpu import flash_kernel
from attnc.runtime.cpu.autograd import GradientWork, Pair, Triple


@dataclass(frozen=True, eq=False)
class OwnBlocks:
    """Heads that choose alike among the same places: what each row chose, bool (rows, places), and what does it."""

    batch: int
    heads: slice
    kv_heads: slice
    chosen: Tensor
    work: GradientWork

    def of(self, *tensors: Tensor) -> list[Tensor]:
        """Their part of q, out or of gradients (B, Hq, N, …)."""
        return [x[self.batch : self.batch + 1, self.heads] for x in tensors]

    def of_keys(self, *tensors: Tensor) -> list[Tensor]:
        """Their part of k, v or of gradients (B, Hkv, N, …)."""
        return [x[self.batch : self.batch + 1, self.kv_heads] for x in tensors]


@dataclass(frozen=True, eq=False)
class SelectedByData:
    """The work of one call, head by head."""

    lanes: Sequence[OwnBlocks]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """(out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv)."""
        out = q.new_zeros((*q.shape[:3], v.shape[-1]))
        lse = torch.full(q.shape[:3], -math.inf, dtype=flash_kernel.lse_dtype(q.dtype), device=q.device)
        for lane in self.lanes:
            (own,), (keys, values) = lane.of(q), lane.of_keys(k, v)
            found = lane.work.forward(own, keys, values, [lane.chosen])
            for whole, part in zip(lane.of(out, lse), found, strict=True):
                whole.copy_(part)
        return out, lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """(dq, dk, dv)."""
        q, k, v, out, lse = kept[:5]
        sums = flash_kernel.lse_dtype(q.dtype)
        grad_q = torch.zeros_like(q)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=sums, device=x.device) for x in (k, v))
        for lane in self.lanes:
            own_q, own_out, own_lse, own_grad = lane.of(q, out, lse, grad_out)
            own = [own_q, *lane.of_keys(k, v), own_out, own_lse, lane.chosen]
            of_lse = None if grad_lse is None else lane.of(grad_lse)[0]
            dq, dk, dv = lane.work.backward(own_grad, of_lse, own)
            lane.of(grad_q)[0].copy_(dq)
            for whole, part in zip(lane.of_keys(grad_k, grad_v), (dk, dv), strict=True):
                whole.add_(part)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
