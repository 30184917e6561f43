"""Keep NaN and infinities of hidden keys out of rows that do not see them.

A kernel multiplies the value of a hidden key by a weight of 0, and 0 · NaN is NaN. Where a result is not finite, it is
computed again with zeros in place of the vectors that are not finite, and rows and keys that these vectors reach, as
the visible pairs say, keep the first result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

WIDEST = 4096.0
"""Products of two numbers of which this many are added up do not overflow below the limit."""

Vectors = tuple[Tensor, Tensor, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""q, k, v → out (B, Hq, Nq, dv), and tensors by row (B, Hq, Nq)."""
Backward = Callable[[Tensor, Tensor | None, Vectors, Sequence[Tensor]], tuple[Tensor, ...]]
"""Gradients of out and of the LSE, q, k, v, and what `Forward` gave → dq, dk, dv."""


def is_finite(*tensors: Tensor) -> bool:
    """Whether the sum of all entries is finite: False also where finite entries add up to an infinity.

    Of one tensor or more, which the host asks for together.
    """
    return math.isfinite(float(reduce(torch.add, map(_sum, tensors))))


def _sum(x: Tensor) -> Tensor:
    return x.sum() if x.dtype != torch.float16 else _largest(x)


def _largest(x: Tensor) -> Tensor:
    """The entry farthest from 0, or NaN; a sum of fp16 overflows soon."""
    low, high = x.aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    return torch.maximum(-low, high)


def forward(run: Forward, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """The results of `run`, in which no hidden key has a part.

    `bias`, for (B, Hq, Nq, Nk): what `run` adds to scores, -inf where a key is hidden. A key whose bias alone makes its
    weight 0 is visible all the same.
    """
    results = run(q, k, v)
    if is_finite(results[0]):
        return results
    bad_q, bad_k = _bad(q, k, v)
    if not (bad_q.any() or bad_k.any()):
        return results
    if bias is None:
        reached = _reached_rows(run, q, k, v, bad_q, bad_k)
    else:
        reached = bad_q | ((bias != -math.inf) & bad_k[..., None, :]).any(-1)
    clean = run(*_zeroed(q, k, v, bad_q, bad_k))
    return tuple(_chosen(reached, own, other) for own, other in zip(results, clean, strict=True))


def backward(
    run: Forward,
    gradients: Backward,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    vectors: Vectors,
    results: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The results of `gradients`, to which hidden keys and rows that see none of a key contribute nothing.

    A row whose incoming gradient is not finite reaches its own query and the keys that it sees.
    """
    found = gradients(grad_out, grad_lse, vectors, results)
    if all(map(is_finite, found)):
        return found
    q, k, v = vectors
    bad_q, bad_k = _bad(q, k, v)
    bad_grad = beyond(grad_out) if grad_lse is None else beyond(grad_out) | beyond(grad_lse[..., None])
    if not (bad_q.any() or bad_k.any() or bad_grad.any()):
        return found
    reached = bad_grad | _reached_rows(run, q, k, v, bad_q, bad_k)
    zeroed = _zeroed(q, k, v, bad_q, bad_k)
    own_out = torch.where(reached[..., None], 0, grad_out)
    own_lse = None if grad_lse is None else torch.where(reached, 0, grad_lse)
    clean = gradients(own_out, own_lse, zeroed, run(*zeroed))
    keys = _reached_keys(run, gradients, zeroed, reached, grad_out)
    return tuple(_chosen(*of_one) for of_one in zip((reached, keys, keys), found, clean, strict=True))


def _bad(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The queries (B, Hq, Nq) and keys (B, Hkv, Nk) with entries that make a product with 0 or -inf no number."""
    return beyond(q), beyond(k) | beyond(v)


def beyond(x: Tensor) -> Tensor:
    """Mask (…) of vectors (…, d) with an entry that is not finite or whose products may overflow."""
    limit = math.sqrt(torch.finfo(torch.promote_types(x.dtype, torch.float32)).max) / WIDEST
    return ~(x.abs() < limit).all(-1)


def _zeroed(q: Tensor, k: Tensor, v: Tensor, bad_q: Tensor, bad_k: Tensor) -> Vectors:
    return (
        torch.where(bad_q[..., None], 0, q),
        torch.where(bad_k[..., None], 0, k),
        torch.where(bad_k[..., None], 0, v),
    )


def _reached_rows(run: Forward, q: Tensor, k: Tensor, v: Tensor, bad_q: Tensor, bad_k: Tensor) -> Tensor:
    """The rows (B, Hq, Nq) that are not finite themselves or see a key that is not: its weight is more than 0."""
    if not bad_k.any():
        return bad_q
    marks = bad_k[..., None].to(v.dtype).expand(v.shape).contiguous()
    seen = run(torch.zeros_like(q), torch.zeros_like(k), marks)[0]
    return bad_q | (seen != 0).any(-1)


def _reached_keys(run: Forward, gradients: Backward, zeroed: Vectors, rows: Tensor, grad_out: Tensor) -> Tensor:
    """The keys (B, Hkv, Nk) that one of these rows sees."""
    q, k, v = (torch.zeros_like(x) for x in zeroed)
    marks = rows[..., None].to(grad_out.dtype).expand(grad_out.shape).contiguous()
    return (gradients(marks, None, (q, k, v), run(q, k, v))[2] != 0).any(-1)


def _chosen(where: Tensor, own: Tensor, other: Tensor) -> Tensor:
    if own.shape[:3] != where.shape:
        return own  # an LSE that nobody needs
    return torch.where(where[..., None] if own.dim() > where.dim() else where, own, other)
