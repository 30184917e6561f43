"""Attention among selected tokens: queries, keys and values are gathered, attended in blocks, and scattered back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnc.compiler.planning.selected_tokens import GatheredRelation, Int64
from attnc.runtime.executors.cpu import cpu_executor, flash_kernel
from attnc.runtime.executors.cpu.autograd import Pair, Triple


@dataclass(frozen=True, eq=False)
class GatheredHeads:
    """Heads that share a selection, with their tokens in ascending order."""

    batch: int
    heads: slice
    kv_heads: slice
    queries: Int64
    keys: Int64


@dataclass(frozen=True, eq=False)
class GatheredPiece:
    """A block of gathered rows and keys by number; `seen`: the mask of visible pairs, None for all."""

    rows: slice
    keys: slice
    seen: Tensor | None

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """Return the additive mask."""
        if self.seen is None:
            return None
        return torch.zeros(self.seen.shape, dtype=dtype).masked_fill_(~self.seen, -math.inf)

    @cached_property
    def blind(self) -> Tensor | None:
        """The rows that see nothing in the block."""
        return None if self.seen is None else ~self.seen.any(-1)


@dataclass(frozen=True, eq=False)
class AmongSelected:
    """The work of one call; `lanes`: the head groups of its selection."""

    lanes: Sequence[GatheredHeads]
    rest: GatheredRelation
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        """Compute (out, lse) of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv)."""
        width, sums = max(q.shape[-1], v.shape[-1]), flash_kernel.lse_dtype(q.dtype)
        out = torch.zeros((*q.shape[:3], v.shape[-1]), dtype=sums)
        lse = torch.full(q.shape[:3], -math.inf, dtype=sums)
        for group in self.lanes:
            queries, keys = torch.from_numpy(group.queries), torch.from_numpy(group.keys)
            queries_of_group = flash_kernel.padded(q[group.batch, group.heads].index_select(1, queries), width)
            k_, v_ = (flash_kernel.padded(x[group.batch, group.kv_heads].index_select(1, keys), width) for x in (k, v))
            total = torch.zeros((*queries_of_group.shape[:2], v.shape[-1]), dtype=sums)
            log = torch.full(queries_of_group.shape[:2], -math.inf, dtype=sums)
            for piece in self._pieces(group):
                vectors = queries_of_group[None, :, piece.rows], k_[None, :, piece.keys], v_[None, :, piece.keys]
                o, part = flash_kernel.attend(*vectors, piece.additive(q.dtype), False, self.scale)
                o, part = o[0, :, :, : v.shape[-1]], part[0]
                if piece.blind is not None:
                    part.masked_fill_(piece.blind, -math.inf)
                    o.masked_fill_(piece.blind[:, None], 0)
                cpu_executor.merge(o, part, total[:, piece.rows], log[:, piece.rows])
            out[group.batch, group.heads].index_copy_(1, queries, total)
            lse[group.batch, group.heads].index_copy_(1, queries, log)
        return out.to(q.dtype), lse

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        """Compute (dq, dk, dv)."""
        q, k, v, out, lse = kept[:5]
        sums, shapes, dtype = flash_kernel.lse_dtype(q.dtype), [x.shape for x in (q, k, v)], q.dtype
        lse, grad_out, grad_lse = flash_kernel.without_blind_rows(lse, grad_out, grad_lse)
        if grad_lse is not None:
            grad_out, q, k, v, out = flash_kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
        width = max(q.shape[-1], v.shape[-1])
        grads = [torch.zeros(shape, dtype=sums) for shape in shapes]
        for group in self.lanes:
            queries, keys = torch.from_numpy(group.queries), torch.from_numpy(group.keys)
            of_rows = [
                flash_kernel.padded(x[group.batch, group.heads].index_select(1, queries), width)
                for x in (grad_out, q, out)
            ]
            of_keys = [flash_kernel.padded(x[group.batch, group.kv_heads].index_select(1, keys), width) for x in (k, v)]
            log = lse[group.batch, group.heads].index_select(1, queries)
            group_grads = [torch.zeros(x.shape, dtype=sums) for x in (of_rows[1], *of_keys)]
            for piece in self._pieces(group):
                do, rows, o = (x[None, :, piece.rows] for x in of_rows)
                k_, v_ = (x[None, :, piece.keys] for x in of_keys)
                row_lse = log[None, :, piece.rows]
                piece_grads = flash_kernel.attend_backward(
                    do, rows, k_, v_, o, row_lse, piece.additive(dtype), False, self.scale
                )
                for total, part, positions in zip(
                    group_grads, piece_grads, (piece.rows, piece.keys, piece.keys), strict=True
                ):
                    total[:, positions] += part[0]
            for total, part, shape, heads, tokens in zip(
                grads,
                group_grads,
                shapes,
                (group.heads, group.kv_heads, group.kv_heads),
                (queries, keys, keys),
                strict=True,
            ):
                total[group.batch, heads].index_add_(1, tokens, part[..., : shape[-1]])
        grad_q, grad_k, grad_v = grads
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)

    def _pieces(self, group: GatheredHeads) -> Iterator[GatheredPiece]:
        for block in self.rest.blocks(group.queries, group.keys):
            seen = None if block.full else self.rest.seen(group.queries[block.rows], group.keys[block.keys])
            if seen is None or seen.any():
                yield GatheredPiece(block.rows, block.keys, None if seen is None else torch.from_numpy(seen))
