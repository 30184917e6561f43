"""Isolation of NaN and infinities: hidden keys that hold them do not reach rows.

A kernel multiplies the value of a hidden key by a weight of 0, and 0 · NaN is NaN. If a result is not finite, it is
computed again with zeros in place of the non-finite vectors; rows and keys that such vectors reach through visible
pairs keep the first result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

WIDEST = 4096.0
"""Maximum number of products of two numbers below the limit whose sum does not overflow."""

Vectors = tuple[Tensor, Tensor, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""A function from q, k, v to out (B, Hq, Nq, dv) and tensors by row (B, Hq, Nq)."""
Backward = Callable[[Tensor, Tensor | None, Vectors, Sequence[Tensor]], tuple[Tensor, ...]]
"""A function from the gradients of out and LSE, (q, k, v), and the results of `Forward` to dq, dk, dv."""


def is_finite(*tensors: Tensor) -> bool:
    """Check whether the sum of all entries is finite; False also if finite entries sum to an infinity.

    Several tensors are checked in one transfer to the host.
    """
    return math.isfinite(float(reduce(torch.add, map(_sum, tensors))))


def _sum(x: Tensor) -> Tensor:
    return x.sum() if x.dtype != torch.float16 else _largest(x)


def _largest(x: Tensor) -> Tensor:
    """Return the entry farthest from 0, or NaN; a sum would overflow fp16 soon."""
    low, high = x.aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    return torch.maximum(-low, high)


def forward(run: Forward, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Compute the results of `run` without contributions of hidden keys.

    `bias`, for (B, Hq, Nq, Nk): the summand of scores in `run`, -inf where a key is hidden. A key whose finite bias
    makes its weight 0 is still visible.
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
    return tuple(_chosen(reached, original, cleaned) for original, cleaned in zip(results, clean, strict=True))


def backward(
    run: Forward,
    gradients: Backward,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    vectors: Vectors,
    results: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Compute the results of `gradients` without contributions of hidden keys, or of rows that do not see a key.

    A row whose incoming gradient is not finite reaches its own query and the keys that it sees.
    """
    originals = gradients(grad_out, grad_lse, vectors, results)
    if all(map(is_finite, originals)):
        return originals
    q, k, v = vectors
    bad_q, bad_k = _bad(q, k, v)
    bad_grad = beyond(grad_out) if grad_lse is None else beyond(grad_out) | beyond(grad_lse[..., None])
    if not (bad_q.any() or bad_k.any() or bad_grad.any()):
        return originals
    reached = bad_grad | _reached_rows(run, q, k, v, bad_q, bad_k)
    zeroed = _zeroed(q, k, v, bad_q, bad_k)
    clean_grad_out = torch.where(reached[..., None], 0, grad_out)
    clean_grad_lse = None if grad_lse is None else torch.where(reached, 0, grad_lse)
    clean = gradients(clean_grad_out, clean_grad_lse, zeroed, run(*zeroed))
    keys = _reached_keys(run, gradients, zeroed, reached, grad_out)
    return tuple(_chosen(*of_one) for of_one in zip((reached, keys, keys), originals, clean, strict=True))


def _bad(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries (B, Hq, Nq) and keys (B, Hkv, Nk) with entries whose product with 0 or -inf is NaN."""
    return beyond(q), beyond(k) | beyond(v)


def beyond(x: Tensor) -> Tensor:
    """Return a mask (…) of vectors (…, d) with an entry that is not finite or whose products may overflow."""
    limit = math.sqrt(torch.finfo(torch.promote_types(x.dtype, torch.float32)).max) / WIDEST
    return ~(x.abs() < limit).all(-1)


def _zeroed(q: Tensor, k: Tensor, v: Tensor, bad_q: Tensor, bad_k: Tensor) -> Vectors:
    return (
        torch.where(bad_q[..., None], 0, q),
        torch.where(bad_k[..., None], 0, k),
        torch.where(bad_k[..., None], 0, v),
    )


def _reached_rows(run: Forward, q: Tensor, k: Tensor, v: Tensor, bad_q: Tensor, bad_k: Tensor) -> Tensor:
    """Return the rows (B, Hq, Nq) that are not finite, or see a non-finite key: its weight is more than 0."""
    if not bad_k.any():
        return bad_q
    marks = bad_k[..., None].to(v.dtype).expand(v.shape).contiguous()
    seen = run(torch.zeros_like(q), torch.zeros_like(k), marks)[0]
    return bad_q | (seen != 0).any(-1)


def _reached_keys(run: Forward, gradients: Backward, zeroed: Vectors, rows: Tensor, grad_out: Tensor) -> Tensor:
    """Return the keys (B, Hkv, Nk) that one of `rows` sees."""
    q, k, v = (torch.zeros_like(x) for x in zeroed)
    marks = rows[..., None].to(grad_out.dtype).expand(grad_out.shape).contiguous()
    return (gradients(marks, None, (q, k, v), run(q, k, v))[2] != 0).any(-1)


def _chosen(where: Tensor, original: Tensor, cleaned: Tensor) -> Tensor:
    if original.shape[:3] != where.shape:
        return original  # an LSE that nobody needs
    return torch.where(where[..., None] if original.dim() > where.dim() else where, original, cleaned)
