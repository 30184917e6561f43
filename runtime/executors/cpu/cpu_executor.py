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
from attnc.runtime.executors.cpu.bound_plan import program_of
from attnc.runtime.executors.cpu.work_items import KernelMask, backward_operands, run_backward, run_forward
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
    q, k, v = _operands(plan.pattern, q, k, v, width)
    whole = empty_like(q, out.shape, lse.dtype) if program.merges and q.dtype != lse.dtype else out
    empty = not (out.numel() and k.numel())
    if empty or not program.covers:
        whole.zero_()
        lse.fill_(-math.inf)
    keep = need != "out" or program.merges
    if not empty:
        for step in program.steps(program.bound((q, whole, lse), (k, v)), q.dtype):
            run_forward(step, (q, k, v), whole, lse if keep else None, scale)
    return (out if whole is out else out.copy_(whole)), lse


def _only(
    pattern: str, visible: KernelMask, q: Tensor, k: Tensor, v: Tensor, scale: float, need: Need
) -> tuple[Tensor, Tensor]:
    """Run the only call, which takes all of q, k and v; results are copied only if their layout must change."""
    layout, width = q, v.shape[-1]
    q, k, v = _operands(pattern, q, k, v, width)
    o, lse = flash_kernel.attend(q, k, v, visible.additive, visible.causal, scale)
    visible.hide_blind(o, lse)
    return _laid_out(o, layout), _laid_out(lse, layout) if need == "lse" else lse


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
        if grad_lse is not None:
            note(plan.pattern, COPY, "the gradient of the LSE widens q, k, v, out and its gradient")
        grad_out, q, k, v, out, lse = backward_operands(grad_out, grad_lse, (q, k, v, out, lse))
        width = max(q.shape[-1], v.shape[-1])
        q, k, v = _operands(plan.pattern, q, k, v, width)
        grad_out = _operand(plan.pattern, "the gradient of out", grad_out, width)
        out = _operand(plan.pattern, "out", out, width)
        all_bound = program.bound((q, out, lse, grad_out, grad_q), (k, v), (grad_k, grad_v))
        for step in program.steps(all_bound, q.dtype):
            run_backward(step, (grad_out, q, k, v, out), lse, (grad_q, grad_k, grad_v), scale)
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
    q_fit, k_fit, v_fit = _operands(pattern, q, k, v, width)
    do = _operand(pattern, "the gradient of out", grad_out, width)
    out = _operand(pattern, "out", out, width)
    grads = flash_kernel.attend_backward(do, q_fit, k_fit, v_fit, out, lse, visible.additive, visible.causal, scale)
    grad_q, grad_k, grad_v = (_laid_out(grad.to(x.dtype), x) for grad, x in zip(grads, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


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


def _operand(pattern: str, name: str, x: Tensor, width: int) -> Tensor:
    """Return `kernel.padded` of `x`; `pattern` and `name` identify it in the note."""
    fitted = flash_kernel.padded(x, width)
    if fitted is not x:
        how = "narrower than the others" if x.shape[-1] < width else "not contiguous"
        note(pattern, COPY, f"{name}: its rows are {how}")
    return fitted


def _operands(pattern: str, q: Tensor, k: Tensor, v: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v padded to `width`."""
    return _operand(pattern, "q", q, width), _operand(pattern, "k", k, width), _operand(pattern, "v", v, width)
