"""The forward pass of attention whose scores are not `scale * dot(q, k)`: the pieces of a plan, tile by tile.

The kernel computes a score that is a multiple of `dot(q, k)` plus a bias, with the bias as its mask. Torch computes all
other scores. Equal inputs give equal bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnc.compiler.ir.value_nodes import extra_of
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.executors.cpu import flash_kernel, plan_tiles
from attnc.runtime.executors.cpu.cpu_executor import merge
from attnc.runtime.executors.cpu.flash_kernel import lse_dtype
from attnc.runtime.executors.cpu.hidden_values import is_finite
from attnc.runtime.executors.cpu.plan_tiles import PlanTile
from attnc.runtime.executors.cpu.spoiled import (
    Cut,
    by_pair,
    cuts,
    spoiled,
)
from attnc.runtime.executors.cpu.tile_scores import Scores
from attnc.runtime.fallbacks import DENSE, note

Vectors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class RowResults:
    """The forward results of every row: out, and the LSE as `lse + shift`, in the dtype of scores.

    `shift` is close to the row's scores if these are large, so that differences from the LSE keep their digits.
    """

    out: Tensor
    lse: Tensor
    shift: Tensor

    def known(self, tile: PlanTile) -> tuple[Tensor, Tensor]:
        """Return the LSE and shift of the rows of a tile."""
        return self.lse[tile.batch][tile.at], self.shift[tile.batch][tile.at]


LARGE = 16.0
"""Limit beyond which scores are shifted."""


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scores: Scores) -> RowResults:
    """Compute the rows of a call; rows that see no key have out 0 and LSE -inf."""
    if plan.fallback is not None:
        note(plan.pattern, DENSE, plan.fallback)
    dtype, group = lse_dtype(q.dtype), q.shape[1] // max(k.shape[1], 1)
    result = RowResults(
        q.new_zeros((*q.shape[:3], v.shape[3]), dtype=dtype),
        q.new_full(q.shape[:3], -math.inf, dtype=dtype),
        q.new_zeros(q.shape[:3], dtype=dtype),
    )
    counted = None if extra_of(scores.node) is None else torch.zeros(q.shape[:3], dtype=torch.bool)
    for tile in plan_tiles.tiles(plan, plan_tiles.ROWS if scores.factor is None else plan_tiles.KERNEL_ROWS):
        _add_tile(tile, (q, k, v), scores, result, group)
        if counted is not None:
            counted[tile.batch][tile.at] |= torch.from_numpy(tile.mask.any(-1))
    if counted is not None:
        _count_extra(q, scores, result, counted)
    return result


Partial = tuple[Tensor, Tensor, Tensor]
"""Partial results (out, lse, shift) of the rows of a tile, from its keys alone."""


def _add_tile(tile: PlanTile, tensors: Vectors, scores: Scores, result: RowResults, group: int) -> None:
    """Merge a tile into the rows of `result`, without contributions of hidden keys."""
    vectors = vectors_of(tile, tensors, group)
    partial_result = _computed(tile, vectors, scores, result.known(tile))
    if is_finite(partial_result[0]) or tile.mask.all():
        _merge(tile, partial_result, result)
        return
    bad = spoiled(tile.mask, *vectors)
    if (bad.queries.any() or bad.keys.any()) and not bad.rows.all():
        q, k, v = vectors
        clean = bad.filled_queries(q), bad.filled_keys(k), bad.filled_keys(v)
        partial_result = _computed(tile, clean, scores, result.known(tile))
    bad = bad.and_rows(~partial_result[0].isfinite().all(-1))
    _merge(tile, partial_result, result, ~bad.rows)
    harm = ~tile.mask & bad.keys.any(0).numpy()
    for cut in cuts(tile.mask, harm, bad.numbers):
        part, cut_vectors = tile.part(cut.rows, cut.keys), vectors_of_cut(vectors, cut)
        partial_result = _computed_of_cut(cut, part, cut_vectors, scores, result.known(part))
        _merge(part, partial_result, result, bad.rows[:, torch.from_numpy(cut.rows)])


def _merge(tile: PlanTile, partial_result: Partial, result: RowResults, where: Tensor | None = None) -> None:
    """Merge partial results of a tile into its rows, or into the rows (heads, rows) that `where` selects."""
    out, lse, shift = (x[tile.batch][tile.at] for x in (result.out, result.lse, result.shift))
    o, part, own_shift = partial_result
    if where is not None:
        o, part = torch.where(where[..., None], o, 0), torch.where(where, part, -math.inf)
        own_shift = torch.where(where, own_shift, shift)
    lse = lse + (shift - own_shift)
    merge(o, part, out, lse)
    for x, rows in ((result.out, out), (result.lse, lse), (result.shift, own_shift)):
        x[tile.batch][tile.at] = rows


def vectors_of(tile: PlanTile, tensors: Vectors, group: int) -> Vectors:
    """Return the queries, keys and values of a tile, (heads, rows or keys, d)."""
    q, k, v = (x[tile.batch] for x in tensors)
    at_keys = tile.at_keys(group)
    return q[tile.at], k[at_keys], v[at_keys]


def vectors_of_cut(vectors: Vectors, cut: Cut) -> Vectors:
    """Return the vectors of a part of a tile."""
    q, k, v = vectors
    rows, keys = torch.from_numpy(cut.rows), torch.from_numpy(cut.keys)
    return q[:, rows], k[:, keys], v[:, keys]


def _computed(tile: PlanTile, vectors: Vectors, scores: Scores, row_state: tuple[Tensor, Tensor]) -> Partial:
    (q, k, v), (lse, shift), factor = vectors, row_state, scores.factor
    dtype = lse.dtype
    score = scores.of(tile, q.to(dtype), k.to(dtype)) if factor is None else scores.bias(tile)
    shift = _shifted(score.detach().amax(-1), shift, lse)
    score = score - shift[..., None] if shift.any() else score
    if factor is None:
        return *_softmax(score, v.to(dtype)), shift
    return *_by_kernel(q, k, v, score, factor), shift


def _computed_of_cut(
    cut: Cut, tile: PlanTile, vectors: Vectors, scores: Scores, row_state: tuple[Tensor, Tensor]
) -> Partial:
    """Compute a part of a tile in torch: the kernel is undefined if a visible score is -inf."""
    (lse, shift), factor = row_state, scores.factor
    q, k, v = (x.to(lse.dtype) for x in vectors)
    if cut.by_pairs:
        q, k = by_pair(tile.mask, q, k)
    if factor is None:
        score = scores.of(tile, q, k)
    else:
        score = factor * ((q * k).sum(-1) if cut.by_pairs else q @ k.transpose(-1, -2)) + scores.bias(tile)
        score = score.masked_fill(torch.from_numpy(~tile.mask), -math.inf)
    shift = _shifted(score.detach().amax(-1), shift, lse)
    score = score - shift[..., None]
    if not cut.by_pairs:
        return *_softmax(score, v), shift
    out, own_lse = _softmax(score[:, :, None], torch.where(torch.from_numpy(tile.mask)[..., None], v[:, None], 0))
    return out[:, :, 0], own_lse[:, :, 0], shift


def _shifted(row_max: Tensor, shift: Tensor, lse: Tensor) -> Tensor:
    """Return the shift of rows: `row_max` if it is large as a first score or far above the LSE, else `shift`.

    A shift far below the scores that dominate a row would cost their digits: beside -12000, fp32 keeps three of 0.1024.
    """
    above = torch.where(lse == -math.inf, row_max.abs(), row_max - (lse + shift))
    return torch.where(row_max.isfinite() & (above > LARGE), row_max, shift)


def _count_extra(q: Tensor, scores: Scores, result: RowResults, counted: Tensor) -> None:
    """Add the extra logits to every row that sees a key, even if all its scores are -inf."""
    for batch in range(q.shape[0]):
        for rows, logit in scores.extra(batch, q[batch].to(result.out.dtype)):
            row_lse, shift = result.lse[batch, :, rows], result.shift[batch, :, rows]
            nearer = _shifted(logit.detach().expand_as(row_lse), shift, row_lse)
            row_lse = row_lse + (shift - nearer)
            result.shift[batch, :, rows] = nearer
            total_lse = torch.logaddexp(row_lse, logit - nearer)
            blind = ~counted[batch, :, rows] | (total_lse == -math.inf)
            total_lse = torch.where(blind, -math.inf, total_lse)
            result.out[batch, :, rows] *= torch.exp(torch.where(blind, 0, row_lse - total_lse))[..., None]
            result.lse[batch, :, rows] = total_lse


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
