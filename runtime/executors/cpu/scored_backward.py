"""The backward pass of attention whose scores are not `scale * dot(q, k)`: scores are recomputed, tile by tile.

If the score is a multiple of `dot(q, k)` plus a bias, and no floating-point input needs a gradient, the kernel computes
it; otherwise torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from attnc.compiler.ir.value_nodes import extra_of
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.executors.cpu import flash_kernel, plan_tiles
from attnc.runtime.executors.cpu.hidden_values import beyond, is_finite
from attnc.runtime.executors.cpu.operands import operand, operands
from attnc.runtime.executors.cpu.plan_tiles import PlanTile
from attnc.runtime.executors.cpu.scored_forward import (
    RowResults,
    Vectors,
    vectors_of,
    vectors_of_cut,
)
from attnc.runtime.executors.cpu.spoiled import by_pair, cuts, spoiled
from attnc.runtime.executors.cpu.tile_scores import Scores
from attnc.runtime.fallbacks import COPY, note


class RowData(NamedTuple):
    """Row data of a backward pass: dO, the LSE, its shift, rowsum(dO ∘ out) − dLSE, out.

    The LSE is +inf in rows that contribute nothing.
    """

    grad_out: Tensor
    lse: Tensor
    shift: Tensor
    delta: Tensor
    out: Tensor

    @property
    def spoiled(self) -> Tensor:
        """The rows with a NaN or an infinity, except an LSE of +inf."""
        return beyond(self.grad_out) | beyond(self.out) | self.lse.isnan() | ~self.delta.isfinite()

    def without(self, rows: Tensor) -> RowData:
        """Return the row data with zeros, and an LSE of +inf, in the given rows."""
        return RowData(
            torch.where(rows[..., None], 0, self.grad_out),
            torch.where(rows, math.inf, self.lse),
            torch.where(rows, 0, self.shift),
            torch.where(rows, 0, self.delta),
            torch.where(rows[..., None], 0, self.out),
        )


TileGradients = tuple["Tensor | None", "Tensor | None", Tensor, Sequence["Tensor | None"]]
"""Gradients of the queries, keys and values of a tile, by query head, and of the floating-point inputs."""

Gradients = Callable[[PlanTile, Vectors, RowData], TileGradients]
"""A function (tile, its vectors, its row data) → gradients of the tile."""


@dataclass(frozen=True)
class GradientSums:
    """Accumulated gradients of q, k and v, and of the floating-point inputs that need them."""

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: Sequence[Tensor]


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: Vectors,
    result: RowResults,
    plan: Plan,
    scores: Scores,
    inputs: Sequence[Tensor],
) -> GradientSums:
    """Compute the gradients of `forward` from its operands q, k and v and its `result`."""
    dtype = result.out.dtype
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in tensors)
    sums = GradientSums(dq, dk, dv, [torch.zeros_like(x, dtype=dtype) for x in inputs])
    factor = scores.factor
    if factor is not None and not inputs:
        _backward_by_kernel(grad_out, grad_lse, tensors, result, plan, scores, factor, sums)
    else:
        _backward_in_torch(grad_out, grad_lse, tensors, result, plan, scores, inputs, sums)
    if extra_of(scores.node) is not None:
        _add_extra(scores, tensors[0], result, _delta(grad_out, grad_lse, result), inputs, sums)
    return sums


def _delta(grad_out: Tensor, grad_lse: Tensor | None, result: RowResults) -> Tensor:
    """Compute rowsum(dO ∘ out) - dLSE."""
    delta = (grad_out.to(result.out.dtype) * result.out).sum(-1)
    return delta if grad_lse is None else delta - torch.where(result.lse == -math.inf, 0, grad_lse)


def _add_gradients(
    tile: PlanTile, of_rows: RowData, tensors: Vectors, gradients: Gradients, by_pairs: Gradients, sums: GradientSums
) -> None:
    """Add the gradients of a tile to `sums`; a spoiled row contributes only where it sees a key."""
    group = tensors[0].shape[1] // max(tensors[1].shape[1], 1)
    vectors = vectors_of(tile, tensors, group)
    rows = RowData(*(x[tile.batch][tile.at] for x in of_rows))
    gradients_of_tile = gradients(tile, vectors, rows)
    if _are_finite(gradients_of_tile) or tile.mask.all():
        _add_tile_gradients(tile, gradients_of_tile, sums, group)
        return
    bad = spoiled(tile.mask, *vectors, rows.spoiled)
    if not bad.rows.all():
        q, k, v = vectors
        clean = bad.filled_queries(q), bad.filled_keys(k), bad.filled_keys(v)
        gradients_of_tile = gradients(tile, clean, rows.without(bad.rows))
        if _are_finite(gradients_of_tile):
            _add_tile_gradients(tile, gradients_of_tile, sums, group)
        else:  # something else is spoiled, such as an input
            bad = bad.and_rows(torch.ones_like(bad.rows))
    for cut in cuts(tile.mask, ~tile.mask, bad.numbers):
        positions = torch.from_numpy(cut.rows)
        part, cut_vectors = tile.part(cut.rows, cut.keys), vectors_of_cut(vectors, cut)
        cut_rows = RowData(*(x[:, positions] for x in rows)).without(~bad.rows[:, positions])
        run = by_pairs if cut.by_pairs else gradients
        _add_tile_gradients(part, run(part, cut_vectors, cut_rows), sums, group)


def _are_finite(gradients: TileGradients) -> bool:
    return all(x is None or is_finite(x) for x in (*gradients[:3], *gradients[3]))


def _gradients_by_pairs(
    scores: Scores, inputs: Sequence[Tensor], tile: PlanTile, vectors: Vectors, rows: RowData
) -> TileGradients:
    """Compute the `Gradients` of few rows, without products with hidden pairs."""
    dtype, seen = rows.lse.dtype, torch.from_numpy(tile.mask)
    with torch.enable_grad():
        q_rows, k_rows = (x.to(dtype).requires_grad_() for x in vectors[:2])
        q, k = by_pair(tile.mask, q_rows, k_rows)
    score, pull = scores.recorded(tile, q, k, rows.shift)
    weights = torch.where(seen, torch.exp(score - rows.lse[..., None]), 0)
    grad_out, v = rows.grad_out.to(dtype), vectors[2].to(dtype)
    of_v = torch.where(seen[..., None], weights[..., None] * grad_out[:, :, None], 0).sum(1)
    change = weights * (grad_out @ v.transpose(-1, -2) - rows.delta[..., None])
    return _pull_atoms(pull(torch.where(seen, change, 0)), (q_rows, k_rows), of_v, inputs)


def _pull_atoms(
    pairs: Sequence[tuple[Tensor, Tensor]], rows: tuple[Tensor, Tensor], of_v: Tensor, inputs: Sequence[Tensor]
) -> TileGradients:
    """Propagate the gradients of a score's atoms to the queries, the keys and the floating-point inputs of a tile."""
    if not pairs:
        return None, None, of_v, [None] * len(inputs)
    atoms, grads = zip(*pairs, strict=True)
    of_q, of_k, *of_inputs = torch.autograd.grad(atoms, [*rows, *inputs], grads, allow_unused=True)
    return of_q, of_k, of_v, of_inputs


def _add_tile_gradients(tile: PlanTile, tile_gradients: TileGradients, sums: GradientSums, group: int) -> None:
    """Add the gradients of a tile, without the padding columns of operands."""
    of_q, of_k, of_v, of_inputs = tile_gradients
    if of_q is not None:
        sums.q[tile.batch][tile.at] += of_q[..., : sums.q.shape[-1]]
    if of_k is not None:
        _add_keys(sums.k[tile.batch], of_k[..., : sums.k.shape[-1]], tile, group)
    _add_keys(sums.v[tile.batch], of_v[..., : sums.v.shape[-1]], tile, group)
    _add(sums.inputs, of_inputs)


def _backward_in_torch(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: Vectors,
    result: RowResults,
    plan: Plan,
    scores: Scores,
    inputs: Sequence[Tensor],
    sums: GradientSums,
) -> None:
    """Add the gradients by dS = P ∘ (dO Vᵀ − rowsum(dO ∘ out) + dLSE), P = exp(S − LSE), and S's `derivatives`."""
    dtype = result.out.dtype

    def gradients(tile: PlanTile, vectors: Vectors, rows: RowData) -> TileGradients:
        with torch.enable_grad():
            q_rows, k_rows = (x.to(dtype).requires_grad_() for x in vectors[:2])
        score, pull = scores.recorded(tile, q_rows, k_rows, rows.shift)
        weights = torch.exp(score - rows.lse[..., None])
        of_v = weights.transpose(-1, -2) @ rows.grad_out
        v_rows = vectors[2].to(dtype)
        change = weights * (rows.grad_out @ v_rows.transpose(-1, -2) - rows.delta[..., None])
        return _pull_atoms(pull(change), (q_rows, k_rows), of_v, inputs)

    delta = _delta(grad_out, grad_lse, result)
    of_rows, blind = RowData(grad_out.to(dtype), result.lse, result.shift, delta, result.out), result.lse == -math.inf
    of_rows = of_rows.without(blind) if blind.any() else of_rows
    for tile in plan_tiles.tiles(plan, plan_tiles.ROWS):
        _add_gradients(tile, of_rows, tensors, gradients, partial(_gradients_by_pairs, scores, inputs), sums)


def _backward_by_kernel(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: Vectors,
    result: RowResults,
    plan: Plan,
    scores: Scores,
    factor: float,
    sums: GradientSums,
) -> None:
    """Add the gradients of q, k and v where the score is `factor * dot(q, k)` plus a bias."""
    q, k, v = tensors
    delta = _delta(grad_out, grad_lse, result)
    out, grad_out = result.out.to(q.dtype), grad_out.to(q.dtype)
    lse, grad_out, grad_lse = flash_kernel.without_blind_rows(result.lse, grad_out, grad_lse)
    if grad_lse is not None:
        note(plan.pattern, COPY, "the gradient of the LSE widens q, k, v, out and its gradient")
        grad_out, q, k, v, out = flash_kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = operands(plan.pattern, q, k, v, width)
    grad_out = operand(plan.pattern, "the gradient of out", grad_out, width)
    out = operand(plan.pattern, "out", out, width)

    def gradients(tile: PlanTile, vectors: Vectors, rows: RowData) -> TileGradients:
        q_rows, k_rows, v_rows = (x[None] for x in vectors)
        bias = scores.bias(tile)
        bias = bias - rows.shift[..., None] if rows.shift.any() else bias
        of_rows = rows.grad_out[None], q_rows, k_rows, v_rows, rows.out[None], rows.lse[None]
        kernel_gradients = flash_kernel.attend_backward(*of_rows, bias[None], False, factor)
        dq, dk, dv = (x[0] for x in kernel_gradients)
        return dq, dk, dv, []

    of_rows = RowData(grad_out, lse, result.shift, delta, out)
    for tile in plan_tiles.tiles(plan, plan_tiles.KERNEL_ROWS):
        _add_gradients(tile, of_rows, (q, k, v), gradients, partial(_gradients_by_pairs, scores, ()), sums)


def _add_extra(
    scores: Scores, q: Tensor, result: RowResults, delta: Tensor, inputs: Sequence[Tensor], sums: GradientSums
) -> None:
    """Add the gradient through the extra logits, whose values are 0: -P_extra ∘ (rowsum(dO ∘ out) - dLSE)."""
    for batch in range(q.shape[0]):
        with torch.enable_grad():
            leaf = q[batch].to(result.out.dtype).detach().requires_grad_()
            extras = list(scores.extra(batch, leaf))
        for rows, logit in extras:
            if not logit.requires_grad:
                continue
            row_lse = result.lse[batch, :, rows]
            safe_lse = torch.where(row_lse == -math.inf, math.inf, row_lse)
            weight = torch.exp(logit.detach() - result.shift[batch, :, rows] - safe_lse)
            dq, *of_inputs = torch.autograd.grad(
                logit, [leaf, *inputs], -weight * delta[batch, :, rows], allow_unused=True
            )
            if dq is not None:
                sums.q[batch] += dq
            _add(sums.inputs, of_inputs)


def _add(totals: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for total, part in zip(totals, parts, strict=True):
        if part is not None:
            total.add_(part)


def _add_keys(total: Tensor, part: Tensor, tile: PlanTile, group: int) -> None:
    """Add gradients by query head to kv heads, in the order of the heads."""
    keys = torch.from_numpy(tile.keys)
    for i, head in enumerate(tile.heads):
        total[head // group, keys] += part[i]  # the keys of a tile are distinct
