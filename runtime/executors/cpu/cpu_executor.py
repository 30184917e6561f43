"""The cpu executor: attention over the pieces of a plan, forward and backward, on strided views of q, k and v.

A piece costs one kernel call if a strided view can express it (`calls`); pieces that share a row are merged by
log-sum-exp. The backward runs the same calls with the output and LSE of the whole row and sums their gradients. Nothing
is atomic or random: equal inputs give equal bits. Autograd must not be recording (`autograd`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.executors.cpu import flash_kernel
from attnc.runtime.executors.cpu.bound_plan import Bound, KernelMask, program_of
from attnc.runtime.executors.cpu.operands import operand, operands
from attnc.runtime.executors.cpu.strided_calls import StridedView
from attnc.runtime.fallbacks import COPY, DENSE, note

Need = Literal["lse", "backward", "out"]
"""The consumer of the log-sum-exp: the caller, the backward, or nobody."""


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, need: Need = "lse") -> tuple[Tensor, Tensor]:
    """Compute attention of q (B, Hq, Nq, dk) over k (B, Hkv, Nk, dk) and v (B, Hkv, Nk, dv) by `plan`.

    Returns out (B, Hq, Nq, dv) in the dtype of q (fp64, fp32, bf16 or fp16, the same for all three) and the natural LSE
    (B, Hq, Nq), fp32 or fp64, both laid out by `empty_like`. If only the backward needs the LSE, its layout is the
    kernel's; if nobody needs it, its values are undefined. Rows that see no key: 0 and −inf.
    """
    if plan.fallback is not None:
        note(plan.pattern, DENSE, plan.fallback)
    program, width = program_of(plan), max(q.shape[-1], v.shape[-1])
    if program.only is not None and width == v.shape[-1]:
        visible = program.visible(program.only, q.dtype)
        if not visible.nothing:
            return _only(plan.pattern, visible, q, k, v, scale, need)
    out = empty_like(q, (*q.shape[:3], v.shape[-1]), q.dtype)
    lse = empty_like(q, q.shape[:3], flash_kernel.lse_dtype(q.dtype))
    q, k, v = operands(plan.pattern, q, k, v, width)
    whole = empty_like(q, out.shape, lse.dtype) if program.merges and q.dtype != lse.dtype else out
    empty = not (out.numel() and k.numel())
    if empty or not program.covers:
        whole.zero_()
        lse.fill_(-math.inf)
    keep = need != "out" or program.merges
    if not empty:
        for bound, visible in program.steps(program.bound((q, whole, lse), (k, v)), q.dtype):
            _run_forward(bound, visible, (q, k, v), whole, lse if keep else None, scale)
    return (out if whole is out else out.copy_(whole)), lse


def _only(
    pattern: str, visible: KernelMask, q: Tensor, k: Tensor, v: Tensor, scale: float, need: Need
) -> tuple[Tensor, Tensor]:
    """Run the only call, which takes all of q, k and v; results are copied only if their layout must change."""
    layout, width = q, v.shape[-1]
    q, k, v = operands(pattern, q, k, v, width)
    o, lse = flash_kernel.attend(q, k, v, visible.additive, visible.causal, scale)
    _hide_blind(visible, o, lse)
    return _laid_out(o, layout), _laid_out(lse, layout) if need == "lse" else lse


def _hide_blind(visible: KernelMask, o: Tensor, lse: Tensor) -> None:
    """Set the results of rows without keys to 0 and -inf."""
    if visible.blind is not None:
        lse.masked_fill_(visible.blind, -math.inf)
        o.masked_fill_(visible.blind[:, None], 0)


def _run_forward(
    bound: Bound,
    visible: KernelMask,
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor | None,
    scale: float,
) -> None:
    """Write, or merge, one call's rows into `out` and `lse`; `lse` is None if all calls write and nobody needs it."""
    call = bound.call
    q_view, out_view, lse_view = bound.queries
    out_rows, lse_rows = _at(out, out_view), None if lse is None else _at(lse, lse_view)
    if visible.nothing:
        if call.fresh:
            out_rows.zero_()
            if lse_rows is not None:
                lse_rows.fill_(-math.inf)
        return
    q, k, v = operands
    k_rows, v_rows = _rows(k, bound.keys[0]), _rows(v, bound.keys[1])
    o, part = flash_kernel.attend(_rows(q, q_view), k_rows, v_rows, visible.additive, visible.causal, scale)
    _hide_blind(visible, o, part)
    if o.shape[-1] != out.shape[-1]:
        o = o[..., : out.shape[-1]]
    o = _like(o, out_view)
    if lse_rows is None:
        out_rows.copy_(o)
    elif call.fresh:
        out_rows.copy_(o)
        lse_rows.copy_(_like(part, lse_view))
    else:
        merge(o, _like(part, lse_view), out_rows, lse_rows)


def merge(o: Tensor, part: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge partial results: update `out` and `lse` with the keys behind `o` and `part`."""
    weight = torch.sigmoid(part - lse).nan_to_num_(0)  # −inf − −inf: neither side has a key, and both outputs are 0
    out.lerp_(o.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, part, out=lse)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dq, dk, dv) of `forward`, whose results were `out` and `lse`. Rows that see no key give exactly 0.

    `grad_lse`: None if the LSE was not used; otherwise it costs a copy of all operands.
    """
    program = program_of(plan)
    if program.only is not None and not program.adds and grad_lse is None and q.shape[-1] == v.shape[-1]:
        visible = program.visible(program.only, q.dtype)
        if not visible.nothing:
            return _only_backward(plan.pattern, visible, grad_out, q, k, v, out, lse, scale)
    sum_dtype = flash_kernel.lse_dtype(q.dtype)
    grad_q = _zeros_like(q, sum_dtype if program.merges else q.dtype)
    grad_k, grad_v = (_zeros_like(x, sum_dtype if program.adds else x.dtype) for x in (k, v))
    if out.numel() and k.numel():
        lse, grad_out, grad_lse = flash_kernel.without_blind_rows(lse, grad_out, grad_lse)
        if grad_lse is not None:
            note(plan.pattern, COPY, "the gradient of the LSE widens q, k, v, out and its gradient")
            grad_out, q, k, v, out = flash_kernel.with_lse_gradient(grad_lse, grad_out, q, k, v, out)
        width = max(q.shape[-1], v.shape[-1])
        q, k, v = operands(plan.pattern, q, k, v, width)
        grad_out = operand(plan.pattern, "the gradient of out", grad_out, width)
        out = operand(plan.pattern, "out", out, width)
        all_bound = program.bound((q, out, lse, grad_out, grad_q), (k, v), (grad_k, grad_v))
        for bound, visible in program.steps(all_bound, q.dtype):
            _run_backward(bound, visible, (grad_out, q, k, v, out), lse, (grad_q, grad_k, grad_v), scale)
    return grad_q.to(q.dtype), grad_k.to(q.dtype), grad_v.to(q.dtype)


def _only_backward(
    pattern: str,
    visible: KernelMask,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the only call, which takes all of q, k and v, without any sums."""
    lse, grad_out, _ = flash_kernel.without_blind_rows(lse, grad_out, None)
    width = q.shape[-1]
    q_fit, k_fit, v_fit = operands(pattern, q, k, v, width)
    do = operand(pattern, "the gradient of out", grad_out, width)
    out = operand(pattern, "out", out, width)
    grads = flash_kernel.attend_backward(do, q_fit, k_fit, v_fit, out, lse, visible.additive, visible.causal, scale)
    grad_q, grad_k, grad_v = (_laid_out(grad.to(x.dtype), x) for grad, x in zip(grads, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


def _run_backward(
    bound: Bound,
    visible: KernelMask,
    operands: tuple[Tensor, ...],
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Add one call's gradients to `grads`; `operands` are grad_out, q, k, v and out."""
    call = bound.call
    if visible.nothing:
        return
    grad_out, q, k, v, out = operands
    q_view, out_view, lse_view, grad_out_view, grad_q_view = bound.queries
    part_q, *parts = flash_kernel.attend_backward(
        _rows(grad_out, grad_out_view),
        _rows(q, q_view),
        _rows(k, bound.keys[0]),
        _rows(v, bound.keys[1]),
        _rows(out, out_view),
        _rows(lse, lse_view),
        visible.additive,
        visible.causal,
        scale,
    )
    rows = _at(grads[0], grad_q_view)
    part_q = _like(part_q[..., : rows.shape[-1]], grad_q_view)
    if call.fresh:
        rows.copy_(part_q)
    else:
        rows.add_(part_q)
    for add, views in bound.adds:
        for total, view, part in zip(grads[1:], views, parts, strict=True):
            piece = part.reshape(add.size)[add.at][..., : total.shape[-1]]
            if add.over:
                piece = piece.sum(add.over, dtype=total.dtype)
            _at(total, view).add_(piece.reshape(view.size))


def _at(x: Tensor, view: StridedView) -> Tensor:
    """Return the tokens of a view, in place."""
    return x if view.whole else x.as_strided(view.size, view.stride, view.offset + x.storage_offset())


def _rows(x: Tensor, view: StridedView) -> Tensor:
    """Return the tokens of a view as the kernel takes them: copied if no strides express them."""
    rows = _at(x, view)
    return rows if view.shape is None else rows.reshape(view.shape)


def _like(rows: Tensor, view: StridedView) -> Tensor:
    """Return the kernel's rows of a view, in the view's dimensions."""
    return rows if view.shape is None else rows.reshape(view.size)


def empty_like(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate `shape` (batch, head, token, …), dense, with tokens or heads outermost as in `x`."""
    if x.stride(2) <= x.stride(1):
        return x.new_empty(shape, dtype=dtype)
    batch, heads, tokens, *rest = shape
    return x.new_empty((batch, tokens, heads, *rest), dtype=dtype).transpose(1, 2)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Return `x`, of one batch entry, in the memory layout of `empty_like`."""
    dense = x if like.stride(2) <= like.stride(1) else x.transpose(1, 2)
    if not dense.is_contiguous():
        return empty_like(like, x.shape, x.dtype).copy_(x)
    return x if x.stride(0) == x.numel() else x.as_strided(x.shape, (x.numel(), *x.stride()[1:]))


def _zeros_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return empty_like(x, x.shape, dtype).zero_()
