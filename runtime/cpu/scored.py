"""Attention whose scores are not `scale * dot(q, k)`: the pieces of a plan, tile by tile.

A score that is a multiple of `dot(q, k)` and a bias goes to the kernel, the bias as its mask. Any other is computed
from the rows and keys of a tile in torch, softened, and merged into the rows by log-sum-exp; so is the backward of what
has real inputs that want gradients. The backward computes scores again. No tile is kept; the same inputs give the same
bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from attnc.compiler.planning.plan import Plan
from attnc.compiler.values import extra_of
from attnc.runtime.cpu import kernel, tiles
from attnc.runtime.cpu.autograd import FirstOrder, once
from attnc.runtime.cpu.executor import merge
from attnc.runtime.cpu.hidden_values import beyond, is_finite
from attnc.runtime.cpu.kernel import lse_dtype
from attnc.runtime.cpu.operands import operand, operands
from attnc.runtime.cpu.planned_call import Call
from attnc.runtime.cpu.scores import Scores
from attnc.runtime.cpu.spoiled import Cut, by_pair, cuts, spoiled
from attnc.runtime.cpu.tiles import Tile
from attnc.runtime.fallbacks import COPY, DENSE, note
from attnc.runtime.profiling import backward_row, keep_name

Vectors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Rows:
    """What a forward leaves of every row: out, and its LSE as `lse + shift`, in the dtype that scores are computed in.

    `shift` is near the row's scores where these are large, so that differences from the LSE keep their digits.
    """

    out: Tensor
    lse: Tensor
    shift: Tensor

    def known(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The LSE and shift of the rows of a tile."""
        return self.lse[tile.batch][tile.at], self.shift[tile.batch][tile.at]


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
    counted = None if extra_of(scores.node) is None else torch.zeros(q.shape[:3], dtype=torch.bool)
    for tile in tiles.tiles(plan, tiles.ROWS if scores.factor is None else tiles.KERNEL_ROWS):
        _add_tile(tile, (q, k, v), scores, result, group)
        if counted is not None:
            counted[tile.batch][tile.at] |= torch.from_numpy(tile.mask.any(-1))
    if counted is not None:
        _count_extra(q, scores, result, counted)
    return result


Partial = tuple[Tensor, Tensor, Tensor]
"""(out, lse, shift) of the rows of a tile, by its keys alone."""


def _add_tile(tile: Tile, tensors: Vectors, scores: Scores, result: Rows, group: int) -> None:
    """Merge a tile into the rows of `result`, none of it by hidden keys."""
    vectors = _vectors_of(tile, tensors, group)
    found = _computed(tile, vectors, scores, result.known(tile))
    if is_finite(found[0]) or tile.mask.all():
        _merge(tile, found, result)
        return
    bad = spoiled(tile.mask, *vectors)
    if (bad.queries.any() or bad.keys.any()) and not bad.rows.all():
        q, k, v = vectors
        clean = bad.filled_queries(q), bad.filled_keys(k), bad.filled_keys(v)
        found = _computed(tile, clean, scores, result.known(tile))
    bad = bad.and_rows(~found[0].isfinite().all(-1))
    _merge(tile, found, result, ~bad.rows)
    harm = ~tile.mask & bad.keys.any(0).numpy()
    for cut in cuts(tile.mask, harm, bad.numbers):
        part, own = tile.part(cut.rows, cut.keys), _vectors_of_cut(vectors, cut)
        found = _computed_of_cut(cut, part, own, scores, result.known(part))
        _merge(part, found, result, bad.rows[:, torch.from_numpy(cut.rows)])


def _merge(tile: Tile, found: Partial, result: Rows, where: Tensor | None = None) -> None:
    """Merge what the keys of a tile give its rows, or those of them (heads, rows) that `where` says."""
    out, lse, shift = (x[tile.batch][tile.at] for x in (result.out, result.lse, result.shift))
    o, part, own_shift = found
    if where is not None:
        o, part = torch.where(where[..., None], o, 0), torch.where(where, part, -math.inf)
        own_shift = torch.where(where, own_shift, shift)
    merge(o, part, out, lse)
    for x, rows in ((result.out, out), (result.lse, lse), (result.shift, own_shift)):
        x[tile.batch][tile.at] = rows


def _vectors_of(tile: Tile, tensors: Vectors, group: int) -> Vectors:
    """The queries, keys and values of a tile, (heads, rows or keys, d)."""
    q, k, v = (x[tile.batch] for x in tensors)
    at_keys = tile.at_keys(group)
    return q[tile.at], k[at_keys], v[at_keys]


def _vectors_of_cut(vectors: Vectors, cut: Cut) -> Vectors:
    """The vectors of a part of a tile."""
    q, k, v = vectors
    rows, keys = torch.from_numpy(cut.rows), torch.from_numpy(cut.keys)
    return q[:, rows], k[:, keys], v[:, keys]


def _computed(tile: Tile, vectors: Vectors, scores: Scores, known: tuple[Tensor, Tensor]) -> Partial:
    (q, k, v), (lse, shift), factor = vectors, known, scores.factor
    dtype = lse.dtype
    score = scores.of(tile, q.to(dtype), k.to(dtype)) if factor is None else scores.bias(tile)
    shift = _shifted(score, shift, lse == -math.inf)
    score = score - shift[..., None] if shift.any() else score
    if factor is None:
        return *_softmax(score, v.to(dtype)), shift
    return *_by_kernel(q, k, v, score, factor), shift


def _computed_of_cut(cut: Cut, tile: Tile, vectors: Vectors, scores: Scores, known: tuple[Tensor, Tensor]) -> Partial:
    """`_computed` of a part, in torch: the kernel has no answer where a score that is visible is -inf."""
    (lse, shift), factor = known, scores.factor
    q, k, v = (x.to(lse.dtype) for x in vectors)
    if cut.by_pairs:
        q, k = by_pair(tile.mask, q, k)
    if factor is None:
        score = scores.of(tile, q, k)
    else:
        score = factor * ((q * k).sum(-1) if cut.by_pairs else q @ k.transpose(-1, -2)) + scores.bias(tile)
        score = score.masked_fill(torch.from_numpy(~tile.mask), -math.inf)
    shift = _shifted(score, shift, lse == -math.inf)
    score = score - shift[..., None]
    if not cut.by_pairs:
        return *_softmax(score, v), shift
    out, own = _softmax(score[:, :, None], torch.where(torch.from_numpy(tile.mask)[..., None], v[:, None], 0))
    return out[:, :, 0], own[:, :, 0], shift


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
    """(out, lse) of scores (…, rows, keys) over v (…, keys, dv)."""
    most = score.amax(-1, keepdim=True)
    weights = torch.exp(score - torch.where(most == -math.inf, 0, most))
    whole = weights.sum(-1)
    lse = torch.where(whole == 0, -math.inf, most[..., 0] + whole.log())  # NaN stays NaN: such a row is not blind
    return (weights @ v) / torch.where(whole == 0, 1, whole)[..., None], lse


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The same of `factor * dot(q, k) + bias`."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, wide = (kernel.padded(x, width)[None] for x in (q, k, v))
    out, lse = kernel.attend(q, k, wide, bias[None], False, factor)
    blind = (bias == -math.inf).all(-1)
    return out[0, ..., : v.shape[-1]].masked_fill(blind[..., None], 0), lse[0].masked_fill(blind, -math.inf)


class OfRows(NamedTuple):
    """Row data of a backward pass: dO, the LSE, its shift, rowsum(dO ∘ out) − dLSE, out.

    The LSE is +inf where a row gives nothing.
    """

    grad_out: Tensor
    lse: Tensor
    shift: Tensor
    delta: Tensor
    out: Tensor

    @property
    def spoiled(self) -> Tensor:
        """Rows with a number that is none; an LSE of +inf is one."""
        return beyond(self.grad_out) | beyond(self.out) | self.lse.isnan() | ~self.delta.isfinite()

    def without(self, rows: Tensor) -> OfRows:
        """Return the row data with zeros, and an LSE of +inf, in the given rows."""
        return OfRows(
            torch.where(rows[..., None], 0, self.grad_out),
            torch.where(rows, math.inf, self.lse),
            torch.where(rows, 0, self.shift),
            torch.where(rows, 0, self.delta),
            torch.where(rows[..., None], 0, self.out),
        )


OfTile = tuple["Tensor | None", "Tensor | None", Tensor, Sequence["Tensor | None"]]
"""Gradients of the queries, keys and values of a tile, by query head, and of the real inputs."""

Gradients = Callable[[Tile, Vectors, OfRows], OfTile]
"""A function (tile, its vectors, its row data) → gradients of the tile."""


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
    tensors: Vectors,
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


def _add_gradients(
    tile: Tile, of_rows: OfRows, tensors: Vectors, gradients: Gradients, by_pairs: Gradients, sums: Sums
) -> None:
    """Add the gradients of a tile to `sums`, those of a spoiled row where the row sees, and nowhere else."""
    group = tensors[0].shape[1] // max(tensors[1].shape[1], 1)
    vectors = _vectors_of(tile, tensors, group)
    rows = OfRows(*(x[tile.batch][tile.at] for x in of_rows))
    found = gradients(tile, vectors, rows)
    if _are_finite(found) or tile.mask.all():
        _add_tile_gradients(tile, found, sums, group)
        return
    bad = spoiled(tile.mask, *vectors, rows.spoiled)
    if not bad.rows.all():
        q, k, v = vectors
        clean = bad.filled_queries(q), bad.filled_keys(k), bad.filled_keys(v)
        found = gradients(tile, clean, rows.without(bad.rows))
        if _are_finite(found):
            _add_tile_gradients(tile, found, sums, group)
        else:  # something else is spoiled, as an input is
            bad = bad.and_rows(torch.ones_like(bad.rows))
    for cut in cuts(tile.mask, ~tile.mask, bad.numbers):
        at = torch.from_numpy(cut.rows)
        part, own = tile.part(cut.rows, cut.keys), _vectors_of_cut(vectors, cut)
        alone = OfRows(*(x[:, at] for x in rows)).without(~bad.rows[:, at])
        run = by_pairs if cut.by_pairs else gradients
        _add_tile_gradients(part, run(part, own, alone), sums, group)


def _are_finite(found: OfTile) -> bool:
    return all(x is None or is_finite(x) for x in (*found[:3], *found[3]))


def _gradients_by_pairs(scores: Scores, inputs: Sequence[Tensor], tile: Tile, vectors: Vectors, rows: OfRows) -> OfTile:
    """`Gradients` of few rows, without a product with what is hidden."""
    dtype, seen = rows.lse.dtype, torch.from_numpy(tile.mask)
    with torch.enable_grad():
        q_rows, k_rows = (x.to(dtype).requires_grad_() for x in vectors[:2])
        q, k = by_pair(tile.mask, q_rows, k_rows)
    score, pull = scores.recorded(tile, q, k, rows.shift)
    weights = torch.where(seen, torch.exp(score - rows.lse[..., None]), 0)
    grad_out, v = rows.grad_out.to(dtype), vectors[2].to(dtype)
    of_v = torch.where(seen[..., None], weights[..., None] * grad_out[:, :, None], 0).sum(1)
    change = weights * (grad_out @ v.transpose(-1, -2) - rows.delta[..., None])
    pairs = pull(torch.where(seen, change, 0))
    if not pairs:
        return None, None, of_v, [None] * len(inputs)
    atoms, grads = zip(*pairs, strict=True)
    of_q, of_k, *found = torch.autograd.grad(atoms, [q_rows, k_rows, *inputs], grads, allow_unused=True)
    return of_q, of_k, of_v, found


def _add_tile_gradients(tile: Tile, found: OfTile, sums: Sums, group: int) -> None:
    """Add what a tile gives, without columns that operands were padded with."""
    of_q, of_k, of_v, of_inputs = found
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
    result: Rows,
    plan: Plan,
    scores: Scores,
    inputs: Sequence[Tensor],
    sums: Sums,
) -> None:
    """dS = P ∘ (dO Vᵀ − rowsum(dO ∘ out) + dLSE), P = exp(S − LSE); of what S is made of, by its `derivatives`."""
    dtype = result.out.dtype

    def gradients(tile: Tile, vectors: Vectors, rows: OfRows) -> OfTile:
        with torch.enable_grad():
            q_rows, k_rows = (x.to(dtype).requires_grad_() for x in vectors[:2])
        score, pull = scores.recorded(tile, q_rows, k_rows, rows.shift)
        weights = torch.exp(score - rows.lse[..., None])
        of_v = weights.transpose(-1, -2) @ rows.grad_out
        v_rows = vectors[2].to(dtype)
        change = weights * (rows.grad_out @ v_rows.transpose(-1, -2) - rows.delta[..., None])
        pairs = pull(change)
        if not pairs:
            return None, None, of_v, [None] * len(inputs)
        atoms, grads = zip(*pairs, strict=True)
        of_q, of_k, *found = torch.autograd.grad(atoms, [q_rows, k_rows, *inputs], grads, allow_unused=True)
        return of_q, of_k, of_v, found

    delta = _delta(grad_out, grad_lse, result)
    of_rows, blind = OfRows(grad_out.to(dtype), result.lse, result.shift, delta, result.out), result.lse == -math.inf
    of_rows = of_rows.without(blind) if blind.any() else of_rows
    for tile in tiles.tiles(plan, tiles.ROWS):
        _add_gradients(tile, of_rows, tensors, gradients, partial(_gradients_by_pairs, scores, inputs), sums)


def _backward_by_kernel(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: Vectors,
    result: Rows,
    plan: Plan,
    scores: Scores,
    factor: float,
    sums: Sums,
) -> None:
    """Add the gradients of q, k and v where the score is `factor * dot(q, k)` and a bias."""
    q, k, v = tensors
    delta = _delta(grad_out, grad_lse, result)
    out, grad_out = result.out.to(q.dtype), grad_out.to(q.dtype)
    lse, grad_out, grad_lse = kernel.without_blind_rows(result.lse, grad_out, grad_lse)
    if grad_lse is not None:
        note(plan.pattern, COPY, "the gradient of the LSE widens q, k, v, out and its gradient")
        grad_out, q, k, v, out = kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = operands(plan.pattern, q, k, v, width)
    grad_out = operand(plan.pattern, "the gradient of out", grad_out, width)
    out = operand(plan.pattern, "out", out, width)

    def gradients(tile: Tile, vectors: Vectors, rows: OfRows) -> OfTile:
        q_rows, k_rows, v_rows = (x[None] for x in vectors)
        bias = scores.bias(tile)
        bias = bias - rows.shift[..., None] if rows.shift.any() else bias
        of_rows = rows.grad_out[None], q_rows, k_rows, v_rows, rows.out[None], rows.lse[None]
        found = kernel.attend_backward(*of_rows, bias[None], False, factor)
        dq, dk, dv = (x[0] for x in found)
        return dq, dk, dv, []

    of_rows = OfRows(grad_out, lse, result.shift, delta, out)
    for tile in tiles.tiles(plan, tiles.KERNEL_ROWS):
        _add_gradients(tile, of_rows, (q, k, v), gradients, partial(_gradients_by_pairs, scores, ()), sums)


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


def _scores(call: Call, q: Tensor, k: Tensor, inputs: Sequence[Tensor]) -> Scores:
    return Scores(call.relations, call.operands(q.unbind(0), k.unbind(0), (), inputs))


class _Attend(FirstOrder):
    """`forward`, recorded. Kept: q, k, v, out, LSE, the shift where scores are `LARGE`, and the inputs."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        found = forward(q, k, v, call.plan, _scores(call, q, k, [x.detach() for x in inputs]))
        own_lse, shift, shifted = found.lse, found.shift, bool(found.shift.any())
        out, lse = found.out.to(q.dtype), own_lse + shift if shifted else own_lse
        ctx.call, ctx.shifted = call, shifted
        keep_name(ctx)
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
        with backward_row(ctx):
            found = once(_gradients, ctx.call, needs, grad_out, grad_lse, *kept)
        return (*found[:3], None, *found[3:])


def _gradients(
    call: Call, needs: Sequence[bool], grad_out: Tensor, grad_lse: Tensor | None, *kept: Tensor
) -> tuple[Tensor | None, ...]:
    """Those of q, k, v, and of the real inputs that need them."""
    q, k, v, out, lse, shift, *inputs = (x.detach() for x in kept)
    leaves = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]

    result = Rows(out.to(lse.dtype), lse, shift)
    sums = backward(grad_out, grad_lse, (q, k, v), result, call.plan, _scores(call, q, k, leaves), wanted)
    rest = iter(sums.inputs)
    of_inputs = [next(rest).to(x.dtype) if need else None for x, need in zip(leaves, needs, strict=True)]
    return sums.q.to(q.dtype), sums.k.to(k.dtype), sums.v.to(v.dtype), *of_inputs


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of a pattern with scores or extra logits of its own, differentiable once in q, k, v and `inputs`."""
    return cast("tuple[Tensor, Tensor]", _Attend.apply(q, k, v, call, *inputs))  # type: ignore[no-untyped-call]
