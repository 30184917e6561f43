"""Recurrences with a memory that is trained as it reads, and recurrences by channel, written from their papers.

Shapes are as in `reference.recurrences`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.recurrences import Result, States, first, memory, outer, read, sequence


def hgrn(q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, f: Tensor) -> Result:
    """Qin et al. 2023, "HGRN" with real gates f (B, T, H, dv): the output is a state of one number per channel."""
    (h,) = first(state, v, (v.shape[-1],))
    rows = []
    for t in range(v.shape[2]):
        h = torch.lerp(v[:, :, t], h, f[:, t])
        rows.append(h)
    return sequence(rows, v), (h,)


def moneta_linear(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, rate: Tensor, hold: Tensor
) -> Result:
    """Behrouz et al. 2025, "It's All Connected" (Miras), Moneta with a matrix: p = 3, q = 4, W = A / ‖A‖₄²."""

    def weights(A: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(A.flatten(-2) + (A.flatten(-2) == 0) * 1e-7, 4, -1)
        return A / size[..., None, None] ** 2

    A = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        error = read(weights(A), k[:, :, t]) - v[:, :, t]
        slope = outer(k[:, :, t], 3 * error.sign() * error.square())
        A = hold[:, t, :, None, None] * A - rate[:, t, :, None, None] * slope
        rows.append(read(weights(A), q[:, :, t]))
    return sequence(rows, v), (A,)


def memora_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    rate: Tensor,
    hold: Tensor,
    mass: float = 1,
) -> Result:
    """Memora with a matrix: W = mass · softmax((1 - λ) log W - η ∇), each column on the simplex.

    `hold` is 1 - λ; the state is (1 - λ) log W - η ∇, whose constants the softmax drops.
    """
    L = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        W = mass * F.softmax(L, -2)
        slope = 2 * outer(k[:, :, t], read(W, k[:, :, t]) - v[:, :, t])
        L = hold[:, t, :, None, None] * L - rate[:, t, :, None, None] * slope
        rows.append(read(mass * F.softmax(L, -2), q[:, :, t]))
    return sequence(rows, v), (L,)


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    rate: Tensor,
    gain: Tensor,
    shift: Tensor,
    chunk: int = 16,
) -> Result:
    """Sun et al. 2024, "Learning to (Learn at Test Time)": half of ‖LN(k W) - v‖², slopes by autograd at the chunk's
    first weights; the residual connections are the caller's.
    """

    def norm(z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[-1:], eps=1e-6) * gain + shift

    def loss(W: Tensor, key: Tensor, wanted: Tensor) -> Tensor:
        return (norm(read(W, key)) - wanted).square().sum() / 2

    W = memory(state, q, v)
    start, rows = W, []
    for t in range(q.shape[2]):
        start = W if t % chunk == 0 else start
        slope = torch.func.grad(loss)(start, k[:, :, t], v[:, :, t])
        W = W - rate[:, t, :, None, None] * slope
        rows.append(norm(read(W, q[:, :, t])))
    return sequence(rows, v), (W,)


def mamba_mixer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    dt: Tensor,
    dt_back: Tensor,
    A: Tensor,
    A_back: Tensor,
    D: Tensor,
) -> Result:
    """Behrouz et al. 2024, "MambaMixer": the token mixer, Mamba's scan in both directions; states of both."""
    n, size = q.shape[2], (q.shape[-1], v.shape[-1])
    out, ends = D[:, None] * v, []
    ways = ((dt, A, range(n)), (dt_back, A_back, range(n - 1, -1, -1)))
    for S, (step, decay, order) in zip(first(state, q, size, size), ways, strict=True):
        now, rows = S, {}
        for t in order:
            now = (step[:, t, :, None] * decay).exp() * now + outer(k[:, :, t], step[:, t] * v[:, :, t])
            rows[t] = read(now, q[:, :, t])
        out = out + sequence([rows[t] for t in range(n)], v)
        ends.append(now)
    return out, tuple(ends)
