"""The kernel of the cpu executor: torch's flash attention for CPUs, with its hazards guarded.

The operator (`aten::_scaled_dot_product_flash_attention_for_cpu`) does not check its arguments. Measured with torch
2.13 and held by `tests/runtime/executors/cpu/test_flash_kernel.py`:

- zero batches, heads, rows or keys kill the process (SIGFPE);
- a last dimension whose stride is not 1 silently gives wrong numbers, and so may a token stride below d (seen
  with few rows of q, also a single row); all other strides are free, 0 and overlaps included;
- dk ≠ dv is rejected, so the narrower side is padded with zeros, which changes no score and no visible output;
- a mask is additive, 2-D masks are broadcast, and it must have the dtype of q: a fp32 mask with fp64
  queries is accepted, and gives wrong numbers with AVX2 (right numbers with AVX-512);
- a row whose mask leaves it no key gets output 0 (NaN if a value is not finite) and LSE 0 instead of −inf;
- a mask may be combined with `causal`, which then skips what is above the diagonal and changes no bit;
- a scale that is not positive gives NaN where something is hidden, because the mask is multiplied too;
- the output has the strides of `torch.empty_like(q)`;
- backward with LSE −inf is NaN in all three gradients, with +inf exactly 0;
- Hq may be any multiple of Hkv, in both directions; a non-multiple is not rejected and reads the wrong head;
- the backward sums dk and dv in the dtype of q, so bf16 loses digits with every block of queries;
- the backward distributes kv heads to threads, so with fewer kv heads than threads some threads are idle.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

_forward = torch._scaled_dot_product_flash_attention_for_cpu  # cheaper to call than through torch.ops
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention of q (x, y·g, rows, d) over k, v (x, y, keys, d): out like q, lse (x, y·g, rows).

    `mask` (rows, keys) is added to the scores; `causal` lets row r see columns <= r. No extent may be 0.
    """
    if scale <= 0:
        q, scale = _for_positive(q, scale)
    results: tuple[Tensor, Tensor] = _forward(q, k, v, is_causal=causal, attn_mask=mask, scale=scale)
    return results


def strides_of_out(q: Tensor) -> tuple[int, ...]:
    """Return the strides of the output of `attend`."""
    return torch.empty_like(q, device="meta").stride()


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dq, dk, dv) of `attend` for a softmax over at least these keys, with results `out` and `lse`.

    dS = P ∘ (dO Vᵀ − δ) with P = exp(S − lse) and δ = rowsum(dO ∘ out): `out` and `lse` are used nowhere else, so the
    values of the whole row give the gradients of one piece of it. `lse` must not be −inf: see `without_blind_rows`.
    Half types are computed in fp32 and the gradients stay fp32: the operator would sum dk and dv in the dtype of its
    operands.
    """
    grad_out, q, k, v, out, mask = _in_single(grad_out, q, k, v, out, mask)
    if scale <= 0:
        positive_q, factor = _for_positive(q, scale)
        dq, dk, dv = attend_backward(grad_out, positive_q, k, v, out, lse, mask, causal, factor)
        return dq * (-1 if scale else 0), dk, dv
    group = q.shape[1] // k.shape[1] if _is_uneven(q, k) else 1
    if group > 1:  # repeat the keys for every query head, and sum their gradients
        k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    dq, dk, dv = _backward(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    if group > 1:
        dk, dv = (x.reshape(len(x), -1, group, *x.shape[2:]).sum(2) for x in (dk, dv))
    return dq, dk, dv


def shared_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `attend_backward` as torch does for heads that share keys, whatever the number of threads."""
    return cast("tuple[Tensor, Tensor, Tensor]", _backward(grad_out, q, k, v, out, lse, 0.0, False, scale=scale))


def attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, parts: int
) -> tuple[Tensor, Tensor]:
    """Compute `attend` of one batch entry with its rows split into `parts` equal parts, to balance threads."""
    if parts == 1:
        return attend(q, k, v, mask, causal, scale)
    k, v = (x.expand(parts, -1, -1, -1) for x in (k, v))
    out, lse = attend(_parted(q, parts), k, v, mask, causal, scale)
    return _whole(out), _whole(lse)


def backward_in_parts(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `attend_backward` of one batch entry with its rows split into `parts` equal parts."""
    if parts == 1:
        return attend_backward(grad_out, q, k, v, out, lse, mask, causal, scale)
    grad_out, q, k, v, out, mask = _in_single(grad_out, q, k, v, out, mask)
    grad_out, q, out, lse = (_parted(x, parts) for x in (grad_out, q, out, lse))
    k, v = (x.expand(parts, -1, -1, -1) for x in (k, v))
    dq, dk, dv = attend_backward(grad_out, q, k, v, out, lse, mask, causal, scale)
    return _whole(dq), dk.sum(0, keepdim=True), dv.sum(0, keepdim=True)


def _in_single(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the operands of a backward, with half types converted to fp32."""
    if lse_dtype(q.dtype) == q.dtype:
        return grad_out, q, k, v, out, mask
    grad_out, q, k, v, out = (
        x.to(torch.float32, memory_format=torch.contiguous_format) for x in (grad_out, q, k, v, out)
    )
    return grad_out, q, k, v, out, None if mask is None else mask.float()


def _parted(x: Tensor, parts: int) -> Tensor:
    """Reshape (1, heads, rows, …) to (parts, heads, rows of a part, …)."""
    return x[0].reshape(x.shape[1], parts, -1, *x.shape[3:]).transpose(0, 1)


def _whole(x: Tensor) -> Tensor:
    """Reshape (parts, heads, rows of a part, …) to (1, heads, rows, …)."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _is_uneven(q: Tensor, k: Tensor) -> bool:
    """Check whether the kernel, which distributes kv heads, would leave threads idle."""
    heads, kv_heads = q.shape[1], k.shape[1]
    return heads > kv_heads and not heads % kv_heads and k.shape[0] * kv_heads < torch.get_num_threads()


def _for_positive(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return queries and a positive scale with the same scores: the kernel multiplies -inf by the scale too."""
    return (-q, -scale) if scale else (torch.zeros_like(q), 1.0)


def padded(x: Tensor, width: int) -> Tensor:
    """Return `x` (…, tokens, d), padded with zeros to `width` in the last dimension; copied if it is not `is_fit`."""
    d = x.shape[-1]
    if d < width:
        return F.pad(x, (0, width - d))
    return x if is_fit(x) else x.contiguous()


def is_fit(x: Tensor) -> bool:
    """Check that the last dimension of `x` (…, tokens, d) is consecutive in memory and its tokens do not overlap."""
    tokens, d = x.shape[-2:]
    return (x.stride(-1) == 1 or d == 1) and (x.stride(-2) >= d or tokens == 1)


def without_blind_rows(lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (lse, grad_out, grad_lse) in which rows with LSE −inf give no gradient, for any finite incoming gradients.

    exp(score − inf) is 0; zeros in the gradients keep products from overflowing to 0 · inf.
    """
    blind = lse == -math.inf
    if not blind.any():
        return lse, grad_out, grad_lse
    grad_out = grad_out.masked_fill(blind.unsqueeze(-1), 0)
    return lse.masked_fill(blind, math.inf), grad_out, None if grad_lse is None else grad_lse.masked_fill(blind, 0)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the LSE of queries of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_lse_gradient(
    grad_lse: Tensor, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (grad_out, q, k, v, out), widened so that `attend_backward` adds the gradient of the LSE.

    That gradient requires dS = P ∘ (dO Vᵀ − (δ − dLSE)). Extra columns with values 0, dO = 1 and out = −dLSE leave dO
    Vᵀ unchanged and replace δ by δ − dLSE. Half types split dLSE over two columns, the second for the rounding error of
    the first.
    """
    dv = v.shape[-1]
    first = grad_lse.to(out.dtype)
    parts = [first]
    if out.dtype in (torch.bfloat16, torch.float16):
        parts.append((grad_lse - first).to(out.dtype))
    width = max(q.shape[-1], -(-(dv + len(parts)) // 8) * 8)
    grad_out, out = F.pad(grad_out, (0, width - dv)), F.pad(out, (0, width - dv))
    for column, part in enumerate(parts, dv):
        grad_out[..., column] = 1
        out[..., column] = -part
    return grad_out, padded(q, width), padded(k, width), padded(v, width), out
