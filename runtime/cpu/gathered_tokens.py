"""Attention among chosen tokens: their queries, keys and values are gathered, attended to in blocks, and put back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnc.compiler.planning.selected_tokens import GatheredRelation, Int64
from attnc.runtime.cpu import cpu_executor, flash_kernel
from attnc.runtime.cpu.autograd import Pair, Triple


@dataclass(frozen=True, eq=False)
class GatheredHeads:
    """Heads that choose alike: their tokens, ascending."""

    batch: int
    heads: slice
    kv_heads: slice
    queries: Int64
    keys: Int64


@dataclass(frozen=True, eq=False)
class GatheredPiece:
    """Gathered rows and keys by number; `seen`: who sees whom, None for all."""

    rows: slice
    keys: slice
    seen: Tensor | None

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to scores."""
        if self.seen is None:
            return None
        return torch.zeros(self.seen.shape, dtype=dtype).masked_fill_(~self.seen, -math.inf)

    @cached_property
    def blind(self) -> Tensor | None:
        """The rows that see nothing here."""
        return None if self.seen is None else ~self.seen.any(-1)


@dataclass(frozen=True, eq=False)
class AmongSelected:
    """The work of one call, of whose choice `lanes` are made."""

    lanes: Sequence[GatheredHeads]
    rest: GatheredRelation
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """(out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv)."""
        width, sums = max(q.shape[-1], v.shape[-1]), flash_kernel.lse_dtype(q.dtype)
        out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=sums)
        lse = torch.full(q.shape[:3], -math.inf, dtype=sums)
        for lane in self.lanes:
            queries, keys = torch.from_numpy(lane.queries), torch.from_numpy(lane.keys)
            own = flash_kernel.padded(q[lane.batch, lane.heads].index_select(1, queries), width)
            k_, v_ = (flash_kernel.padded(x[lane.batch, lane.kv_heads].index_select(1, keys), width) for x in (k, v))
            total = torch.zeros((*own.shape[:2], v.shape[-1]), dtype=sums)
            log = torch.full(own.shape[:2], -math.inf, dtype=sums)
            for piece in self._pieces(lane):
                some = own[None, :, piece.rows], k_[None, :, piece.keys], v_[None, :, piece.keys]
                o, part = flash_kernel.attend(*some, piece.additive(q.dtype), False, self.scale)
                o, part = o[0, :, :, : v.shape[-1]], part[0]
                if piece.blind is not None:
                    part.masked_fill_(piece.blind, -math.inf)
                    o.masked_fill_(piece.blind[:, None], 0)
                cpu_executor.merge(o, part, total[:, piece.rows], log[:, piece.rows])
            out[lane.batch, lane.heads].index_copy_(1, queries, total)
            lse[lane.batch, lane.heads].index_copy_(1, queries, log)
        return out.to(q.dtype), lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """(dq, dk, dv)."""
        q, k, v, out, lse = kept[:5]
        sums, shapes, dtype = flash_kernel.lse_dtype(q.dtype), [x.shape for x in (q, k, v)], q.dtype
        lse, grad_out, grad_lse = flash_kernel.without_blind_rows(lse, grad_out, grad_lse)
        if grad_lse is not None:
            grad_out, q, k, v, out = flash_kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
        width = max(q.shape[-1], v.shape[-1])
        grads = [torch.zeros(shape, dtype=sums) for shape in shapes]
        for lane in self.lanes:
            queries, keys = torch.from_numpy(lane.queries), torch.from_numpy(lane.keys)
            of_rows = [
                flash_kernel.padded(x[lane.batch, lane.heads].index_select(1, queries), width)
                for x in (grad_out, q, out)
            ]
            of_keys = [flash_kernel.padded(x[lane.batch, lane.kv_heads].index_select(1, keys), width) for x in (k, v)]
            log = lse[lane.batch, lane.heads].index_select(1, queries)
            own = [torch.zeros(x.shape, dtype=sums) for x in (of_rows[1], *of_keys)]
            for piece in self._pieces(lane):
                do, rows, o = (x[None, :, piece.rows] for x in of_rows)
                k_, v_ = (x[None, :, piece.keys] for x in of_keys)
                known = log[None, :, piece.rows]
                found = flash_kernel.attend_backward(
                    do, rows, k_, v_, o, known, piece.additive(dtype), False, self.scale
                )
                for whole, part, at in zip(own, found, (piece.rows, piece.keys, piece.keys), strict=True):
                    whole[:, at] += part[0]
            for whole, part, shape, heads, tokens in zip(
                grads,
                own,
                shapes,
                (lane.heads, lane.kv_heads, lane.kv_heads),
                (queries, keys, keys),
                strict=True,
            ):
                whole[lane.batch, heads].index_add_(1, tokens, part[..., : shape[-1]])
        grad_q, grad_k, grad_v = grads
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)

    def _pieces(self, lane: GatheredHeads) -> Iterator[GatheredPiece]:
        for block in self.rest.blocks(lane.queries, lane.keys):
            seen = None if block.full else self.rest.seen(lane.queries[block.rows], lane.keys[block.keys])
            if seen is None or seen.any():
                yield GatheredPiece(block.rows, block.keys, None if seen is None else torch.from_numpy(seen))
