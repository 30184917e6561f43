"""Attention whose scores are not `scale * dot(q, k)`: the pieces of a plan, tile by tile.

A score that is a multiple of `dot(q, k)` and a bias goes to the kernel, the bias as its mask. Any other is computed
from the rows and keys of a tile in torch, softened, and merged into the rows by log-sum-exp; so is the backward of what
has real inputs that want gradients. The backward computes scores again. No tile is kept; the same inputs give the same
bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from attnc.compiler.planning.plan import Plan
from attnc.compiler.values import extra_of
from attnc.runtime.cpu import hidden_values, kernel, tiles
from attnc.runtime.cpu.autograd import FirstOrder, once
from attnc.runtime.cpu.executor import merge
from attnc.runtime.cpu.kernel import lse_dtype
from attnc.runtime.cpu.operands import operand, operands
from attnc.runtime.cpu.planned_call import Call
from attnc.runtime.cpu.scores import Scores
from attnc.runtime.cpu.tiles import Tile
from attnc.runtime.fallbacks import COPY, DENSE, note


@dataclass(frozen=True)
class Rows:
    """What a forward leaves of every row: out, and its LSE as `lse + shift`, in the dtype that scores are computed in.

    `shift` is near the row's scores where these are large, so that differences from the LSE keep their digits.
    """

    out: Tensor
    lse: Tensor
    shift: Tensor


LARGE = 16.0
"""Scores beyond this are shifted."""


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scores: Scores) -> Rows:
    """The rows of a call; those that see nothing have out 0 and LSE -inf."""
    if plan.fallback is not None:
        note(plan.pattern, DENSE, plan.fallback)
    dtype, group = lse_dtype(q.dtype), q.shape[1] // max(k.shape[1], 1)
    result = Rows(
        q.new_zeros((*q.shape[:3], v.shape[3]), dtype=dtype),
        q.new_full(q.shape[:3], -math.inf, dtype=dtype),
        q.new_zeros(q.shape[:3], dtype=dtype),
    )
    factor = scores.factor
    counted = None if extra_of(scores.node) is None else torch.zeros(q.shape[:3], dtype=torch.bool)
    for tile in tiles.tiles(plan, tiles.ROWS if factor is None else tiles.KERNEL_ROWS):
        at, at_keys = tile.at, tile.at_keys(group)
        q_rows = q[tile.batch][at]
        k_rows, v_rows = (x[tile.batch][at_keys] for x in (k, v))
        out, lse, shift = (x[tile.batch][at] for x in (result.out, result.lse, result.shift))
        score = scores.of(tile, q_rows.to(dtype), k_rows.to(dtype)) if factor is None else scores.bias(tile)
        shift = _shifted(score, shift, lse == -math.inf)
        score = score - shift[..., None] if shift.any() else score
        if factor is None:
            o, part = _softmax(score, v_rows.to(dtype))
        else:
            o, part = _by_kernel(q_rows, k_rows, v_rows, score, factor)
        merge(o, part, out, lse)
        for x, rows in ((result.out, out), (result.lse, lse), (result.shift, shift)):
            x[tile.batch][at] = rows
        if counted is not None:
            counted[tile.batch][at] |= torch.from_numpy(tile.mask.any(-1))
    if counted is not None:
        _count_extra(q, scores, result, counted)
    return result


def _shifted(score: Tensor, shift: Tensor, new: Tensor) -> Tensor:
    """The shift of rows, where they are new from their first scores, if these are large."""
    most = score.detach().amax(-1)
    return torch.where(new & most.isfinite() & (most.abs() > LARGE), most, shift)


def _count_extra(q: Tensor, scores: Scores, result: Rows, counted: Tensor) -> None:
    """Give the extra logits their share of every row that sees something, perhaps with scores of -inf alone."""
    for batch in range(q.shape[0]):
        for rows, logit in scores.extra(batch, q[batch].to(result.out.dtype)):
            own = result.lse[batch, :, rows]
            more = torch.logaddexp(own, logit - result.shift[batch, :, rows])
            blind = ~counted[batch, :, rows] | (more == -math.inf)
            more = torch.where(blind, -math.inf, more)
            result.out[batch, :, rows] *= torch.exp(torch.where(blind, 0, own - more))[..., None]
            result.lse[batch, :, rows] = more


def _softmax(score: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of scores (heads, rows, keys) over v (heads, keys, dv)."""
    most = score.amax(-1, keepdim=True)
    weights = torch.exp(score - torch.where(most == -math.inf, 0, most))
    whole = weights.sum(-1)
    lse = torch.where(whole > 0, most[..., 0] + whole.log(), -math.inf)
    return (weights @ v) / torch.where(whole > 0, whole, 1)[..., None], lse


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The same of `factor * dot(q, k) + bias`."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, wide = (kernel.padded(x, width)[None] for x in (q, k, v))
    out, lse = kernel.attend(q, k, wide, bias[None], False, factor)
    blind = (bias == -math.inf).all(-1)
    return out[0, ..., : v.shape[-1]].masked_fill(blind[..., None], 0), lse[0].masked_fill(blind, -math.inf)


@dataclass(frozen=True)
class Sums:
    """Gradients of q, k and v, and of the real inputs that want them, as they are added up."""

    q: Tensor
    k: Tensor
    v: Tensor
    inputs: Sequence[Tensor]


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: tuple[Tensor, Tensor, Tensor],
    result: Rows,
    plan: Plan,
    scores: Scores,
    inputs: Sequence[Tensor],
) -> Sums:
    """The gradients of `forward`, whose operands were q, k and v and whose result is given."""
    dtype = result.out.dtype
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in tensors)
    sums = Sums(dq, dk, dv, [torch.zeros_like(x, dtype=dtype) for x in inputs])
    factor = scores.factor
    if factor is not None and not inputs:
        _backward_by_kernel(grad_out, grad_lse, tensors, result, plan, scores, factor, sums)
    else:
        _backward_in_torch(grad_out, grad_lse, tensors, result, plan, scores, inputs, sums)
    if extra_of(scores.node) is not None:
        _add_extra(scores, tensors[0], result, _delta(grad_out, grad_lse, result), inputs, sums)
    return sums


def _delta(grad_out: Tensor, grad_lse: Tensor | None, result: Rows) -> Tensor:
    """rowsum(dO ∘ out) - dLSE."""
    delta = (grad_out.to(result.out.dtype) * result.out).sum(-1)
    return delta if grad_lse is None else delta - torch.where(result.lse == -math.inf, 0, grad_lse)


def _backward_in_torch(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: tuple[Tensor, Tensor, Tensor],
    result: Rows,
    plan: Plan,
    scores: Scores,
    inputs: Sequence[Tensor],
    sums: Sums,
) -> None:
    """dS = P ∘ (dO Vᵀ − rowsum(dO ∘ out) + dLSE), P = exp(S − LSE); of what S is made of, by its `derivatives`."""
    q, k, v = tensors
    dtype, group = result.out.dtype, q.shape[1] // max(k.shape[1], 1)
    grad_out, delta = grad_out.to(dtype), _delta(grad_out, grad_lse, result)
    safe = torch.where(result.lse == -math.inf, math.inf, result.lse)
    for tile in tiles.tiles(plan, tiles.ROWS):
        at, at_keys = tile.at, tile.at_keys(group)
        with torch.enable_grad():
            q_rows = q[tile.batch][at].to(dtype).requires_grad_()
            k_rows = k[tile.batch][at_keys].to(dtype).requires_grad_()
        score, pull = scores.recorded(tile, q_rows, k_rows, result.shift[tile.batch][at])
        weights = torch.exp(score - safe[tile.batch][at][..., None])
        do = grad_out[tile.batch][at]
        _add_keys(sums.v[tile.batch], weights.transpose(-1, -2) @ do, tile, group)
        v_rows = v[tile.batch][at_keys].to(dtype)
        change = weights * (do @ v_rows.transpose(-1, -2) - delta[tile.batch][at][..., None])
        pairs = pull(change)
        if not pairs:
            continue
        atoms, grads = zip(*pairs, strict=True)
        dq, dk, *found = torch.autograd.grad(atoms, [q_rows, k_rows, *inputs], grads, allow_unused=True)
        if dq is not None:
            sums.q[tile.batch][at] += dq
        if dk is not None:
            _add_keys(sums.k[tile.batch], dk, tile, group)
        _add(sums.inputs, found)


def _backward_by_kernel(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: tuple[Tensor, Tensor, Tensor],
    result: Rows,
    plan: Plan,
    scores: Scores,
    factor: float,
    sums: Sums,
) -> None:
    """Add the gradients of q, k and v where the score is `factor * dot(q, k)` and a bias."""
    q, k, v = tensors
    group = q.shape[1] // max(k.shape[1], 1)
    out, grad_out = result.out.to(q.dtype), grad_out.to(q.dtype)
    lse, grad_out, grad_lse = kernel.without_blind_rows(result.lse, grad_out, grad_lse)
    if grad_lse is not None:
        note(plan.pattern, COPY, "the gradient of the LSE widens q, k, v, out and its gradient")
        grad_out, q, k, v, out = kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = operands(plan.pattern, q, k, v, width)
    grad_out = operand(plan.pattern, "the gradient of out", grad_out, width)
    out = operand(plan.pattern, "out", out, width)
    for tile in tiles.tiles(plan, tiles.KERNEL_ROWS):
        at, at_keys = tile.at, tile.at_keys(group)
        do, q_rows, out_rows, lse_rows = (x[tile.batch][at][None] for x in (grad_out, q, out, lse))
        k_rows, v_rows = (x[tile.batch][at_keys][None] for x in (k, v))
        bias, shift = scores.bias(tile), result.shift[tile.batch][at]
        bias = bias - shift[..., None] if shift.any() else bias
        dq, dk, dv = kernel.attend_backward(do, q_rows, k_rows, v_rows, out_rows, lse_rows, bias[None], False, factor)
        sums.q[tile.batch][at] += dq[0, ..., : sums.q.shape[-1]]
        _add_keys(sums.k[tile.batch], dk[0, ..., : sums.k.shape[-1]], tile, group)
        _add_keys(sums.v[tile.batch], dv[0, ..., : sums.v.shape[-1]], tile, group)


def _add_extra(scores: Scores, q: Tensor, result: Rows, delta: Tensor, inputs: Sequence[Tensor], sums: Sums) -> None:
    """The gradient through the extra logits, whose values are 0: -P_extra ∘ (rowsum(dO ∘ out) - dLSE)."""
    for batch in range(q.shape[0]):
        with torch.enable_grad():
            leaf = q[batch].to(result.out.dtype).detach().requires_grad_()
            extras = list(scores.extra(batch, leaf))
        for rows, logit in extras:
            if not logit.requires_grad:
                continue
            own = result.lse[batch, :, rows]
            whole = torch.where(own == -math.inf, math.inf, own)
            share = torch.exp(logit.detach() - result.shift[batch, :, rows] - whole)
            dq, *found = torch.autograd.grad(logit, [leaf, *inputs], -share * delta[batch, :, rows], allow_unused=True)
            if dq is not None:
                sums.q[batch] += dq
            _add(sums.inputs, found)


def _add(totals: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for total, part in zip(totals, parts, strict=True):
        if part is not None:
            total.add_(part)


def _add_keys(total: Tensor, part: Tensor, tile: Tile, group: int) -> None:
    """Add gradients by query head to kv heads, in the order of the heads."""
    keys = torch.from_numpy(tile.keys)
    for i, head in enumerate(tile.heads):
        total[head // group, keys] += part[i]  # the keys of a tile are distinct


def _rows(call: Call, inputs: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = forward(q, k, v, call.plan, _scores(call, q, k, [x.detach() for x in inputs]))
    return found.out, found.lse, found.shift


def _scores(call: Call, q: Tensor, k: Tensor, inputs: Sequence[Tensor]) -> Scores:
    return Scores(call.relations, call.operands(q.unbind(0), k.unbind(0), (), inputs))


class _Attend(FirstOrder):
    """`forward`, recorded. Kept: q, k, v, out, LSE, the shift where scores are `LARGE`, and the inputs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        rows, own_lse, shift = hidden_values.forward(partial(_rows, call, inputs), q, k, v)
        shifted = bool(shift.any())
        out, lse = rows.to(q.dtype), own_lse + shift if shifted else own_lse
        ctx.call, ctx.shifted = call, shifted
        ctx.save_for_backward(q, k, v, out, own_lse, *([shift] if shifted else []), *inputs)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        kept = ctx.saved_tensors
        if not ctx.shifted:
            kept = *kept[:5], torch.zeros_like(kept[4]), *kept[5:]
        grad_out = torch.zeros_like(kept[3]) if grad_out is None else grad_out
        needs = ctx.needs_input_grad[4:]
        found = once(_gradients, ctx.call, needs, grad_out, grad_lse, *kept)
        return (*found[:3], None, *found[3:])


def _gradients(
    call: Call, needs: Sequence[bool], grad_out: Tensor, grad_lse: Tensor | None, *kept: Tensor
) -> tuple[Tensor | None, ...]:
    """Those of q, k, v, and of the real inputs that need them."""
    q, k, v, out, lse, shift, *inputs = (x.detach() for x in kept)
    leaves = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]

    def gradients(
        grad_out: Tensor, grad_lse: Tensor | None, vectors: hidden_values.Vectors, results: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        scores = _scores(call, vectors[0], vectors[1], leaves)
        sums = backward(grad_out, grad_lse, vectors, Rows(*results), call.plan, scores, wanted)
        return sums.q, sums.k, sums.v, *sums.inputs

    run = partial(_rows, call, inputs)
    found = hidden_values.backward(run, gradients, grad_out, grad_lse, (q, k, v), (out.to(lse.dtype), lse, shift))
    dq, dk, dv, *of_wanted = found
    rest = iter(of_wanted)
    of_inputs = [next(rest).to(x.dtype) if need else None for x, need in zip(leaves, needs, strict=True)]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *of_inputs


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of a pattern with scores or extra logits of its own, differentiable once in q, k, v and `inputs`."""
    return cast("tuple[Tensor, Tensor]", _Attend.apply(q, k, v, call, *inputs))  # type: ignore[no-untyped-call]
