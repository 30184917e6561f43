"""Recurrences as loops over tokens, written directly from the equations: the oracle and a rival of attnc."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loop = Callable[..., Tensor]


def _looped(step: Callable[[Tensor, int], Tensor], q: Tensor, state: Tensor, *, before: bool = False) -> Tensor:
    """Return the reads of all tokens: qᵀ S after the step, or before it."""
    outs = []
    for t in range(q.shape[2]):
        seen = state
        state = step(state, t)
        outs.append((q[:, :, t, None] @ (seen if before else state))[:, :, 0])
    return torch.stack(outs, 2)


def _empty(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])


def _sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    fq, fk = F.elu(q) + 1, F.elu(k) + 1
    out = _looped(lambda S, t: S + fk[:, :, t, :, None] * v[:, :, t, None], fq, _empty(k, v))
    return out / (fq * fk.cumsum(2)).sum(-1, keepdim=True)


def _decayed(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, *, before: bool = False) -> Tensor:
    """Loop over a decayed state; `decay` (B, H, T, …) broadcasts to the state."""

    def step(S: Tensor, t: int) -> Tensor:
        return decay[:, :, t] * S + k[:, :, t, :, None] * v[:, :, t, None]

    return _looped(step, q, _empty(k, v), before=before)


def _constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = (1 - 2.0 ** (-5 - torch.arange(q.shape[1])))[:, None, None, None].to(q)
    return _decayed(q * q.shape[-1] ** -0.5, k, v, decay[None].expand(1, -1, q.shape[2], 1, 1))


def _scalar(q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt: Tensor, D: Tensor) -> Tensor:
    decay, written = g.transpose(1, 2).exp()[..., None, None], dt.transpose(1, 2)[..., None] * k
    return _decayed(q, written, v, decay) + D[:, None, None] * v


def _rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return _decayed(q * q.shape[-1] ** -0.5, k, v, g.transpose(1, 2).exp()[..., None])


def _before(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor) -> Tensor:
    scaled = q * q.shape[-1] ** -0.5
    bonus: Tensor = (scaled * u[:, None] * k).sum(-1, keepdim=True) * v
    return _decayed(scaled, k, v, g.transpose(1, 2).exp()[..., None], before=True) + bonus


def _slots(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    decay, slot = g.transpose(1, 2).exp(), s.transpose(1, 2)
    weights = _decayed(q * q.shape[-1] ** -0.5, k, slot, decay[..., None, :]).softmax(-1)
    return _decayed(weights, slot, v, decay[..., None])


def _corrected(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, p: Tensor | None = None) -> Tensor:
    read, beta = k if p is None else p, beta.transpose(1, 2)[..., None]

    def step(S: Tensor, t: int) -> Tensor:
        S = S if decay is None else decay[:, :, t] * S
        rest = beta[:, :, t] * (v[:, :, t] - (read[:, :, t, None] @ S)[:, :, 0])
        return S + k[:, :, t, :, None] * rest[:, :, None]

    return _looped(step, q, _empty(k, v))


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return _corrected(q * q.shape[-1] ** -0.5, k, v, beta, None)


def _gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return _corrected(q * q.shape[-1] ** -0.5, k, v, beta, g.transpose(1, 2).exp()[..., None, None])


def _kimi(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return _corrected(q * q.shape[-1] ** -0.5, k, v, beta, g.transpose(1, 2).exp()[..., None])


def _comba(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, decay: Tensor, D: Tensor) -> Tensor:
    p = decay.sigmoid()[:, None, None] * k
    scaled = (q - D[:, None, None] * p) * q.shape[-1] ** -0.5
    return _corrected(scaled, k, v, beta, g.transpose(1, 2).exp()[..., None, None], p)


def _product(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, ks: Tensor, vs: Tensor) -> Tensor:
    decay, beta = g.transpose(1, 2).exp()[..., None, None], beta.transpose(1, 2)[..., None]
    ks, vs = ks.transpose(1, 2), vs.transpose(1, 2)

    def step(S: Tensor, t: int) -> Tensor:
        S = decay[:, :, t] * S
        for j in range(ks.shape[3]):
            rest = beta[:, :, t, j] * (vs[:, :, t, j] - (ks[:, :, t, j, None] @ S)[:, :, 0])
            S = S + ks[:, :, t, j, :, None] * rest[:, :, None]
        return S

    return _looped(step, q * q.shape[-1] ** -0.5, _empty(k, v))


def _rank_one(q: Tensor, k: Tensor, v: Tensor, w: Tensor, a: Tensor, b: Tensor, r_k: Tensor) -> Tensor:
    w, a, b = (x.transpose(1, 2) for x in (w, a, b))

    def step(S: Tensor, t: int) -> Tensor:
        seen = a[:, :, t, None] @ S
        return w[:, :, t, :, None] * S + b[:, :, t, :, None] * seen + k[:, :, t, :, None] * v[:, :, t, None]

    return _looped(step, q, _empty(k, v)) + (q * r_k[:, None] * k).sum(-1, keepdim=True) * v


def _entries(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """Loop as in Mamba's code (`selective_scan_ref` of state-spaces/mamba): decays and writes of all tokens first."""
    dt = dt.transpose(1, 2)
    decay, written = (dt[..., None, :] * A[:, None]).exp(), k[..., :, None] * (dt * v)[..., None, :]
    return _looped(lambda S, t: decay[:, :, t] * S + written[:, :, t], q, _empty(k, v)) + D[:, None] * v


def _entries_at_once(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """Run the loop with every value computed where it is used, so that values stay in the cache."""
    dt = dt.transpose(1, 2)
    written = dt * v

    def step(S: Tensor, t: int) -> Tensor:
        return (dt[:, :, t, None] * A).exp() * S + k[:, :, t, :, None] * written[:, :, t, None]

    return _looped(step, q, _empty(k, v)) + D[:, None] * v


def _softmax(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    scores = (k * w[:, None]).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    top, total, mean = scores.new_full(scores[:, :, 0].shape, -math.inf), scores[:, :, 0] * 0, v[:, :, 0] * 0
    outs = []
    for t in range(v.shape[2]):
        new = torch.maximum(top, scores[:, :, t])
        keep, share = (top - new).exp(), (scores[:, :, t] - new).exp()
        total, mean, top = keep * total + share, keep * mean + share * v[:, :, t], new
        outs.append(mean / total)
    return torch.stack(outs, 2)


def _slopes(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, hold: Tensor, forget: Tensor) -> Tensor:
    """Loop over Titans: momentum P of the slopes at the first weights of each 64 tokens."""
    P = first = M = _empty(k, v)
    rate, hold, forget = (x.transpose(1, 2)[..., None, None] for x in (rate, hold, forget))
    outs, keys, keep = [], -2 * rate * k[..., None], 1 - forget
    for t in range(q.shape[2]):
        first = M if t % 64 == 0 else first
        P = hold[:, :, t] * P + keys[:, :, t] * (k[:, :, t, None] @ first - v[:, :, t, None])
        M = keep[:, :, t] * M + P
        outs.append((q[:, :, t, None] @ M)[:, :, 0])
    return torch.stack(outs, 2)


def _complex(q: Tensor, k: Tensor, v: Tensor, L: Tensor, dt: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    decay = (L * dt).exp()
    written = torch.einsum("hnv,bhtv->bhtn", B * ((decay - 1) / L)[..., None], v.to(B.dtype))
    x, states = torch.zeros_like(written[:, :, 0]), []
    for t in range(v.shape[2]):
        x = decay * x + written[:, :, t]
        states.append(x)
    return 2 * torch.einsum("hvn,bhtn->bhtv", C, torch.stack(states, 2)).real + D[:, None] * v


def _solved(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, ridge: Tensor) -> Tensor:
    decay, share = g.transpose(1, 2).exp()[..., None, None], beta.transpose(1, 2)[..., None, None] * k[..., None]
    A, S = _empty(k, k), _empty(k, v)
    outs = []
    for t in range(q.shape[2]):
        A = decay[:, :, t] * A + share[:, :, t] * k[:, :, t, None]
        S = decay[:, :, t] * S + share[:, :, t] * v[:, :, t, None]
        outs.append((_descended(A, ridge, q[:, :, t])[:, :, None] @ S)[:, :, 0])
    return torch.stack(outs, 2)


def _descended(A: Tensor, ridge: Tensor, q: Tensor) -> Tensor:
    """Take 30 steps of conjugate gradients."""
    x, rest = torch.zeros_like(q), q
    direction, size = q, (q * q).sum(-1, keepdim=True)
    for _ in range(30):
        ahead = (A @ direction[..., None])[..., 0] + ridge * direction
        step = size / (direction * ahead).sum(-1, keepdim=True).clamp(min=1e-30)
        x, rest = x + step * direction, rest - step * ahead
        smaller = (rest * rest).sum(-1, keepdim=True)
        direction, size = rest + smaller / size.clamp(min=1e-30) * direction, smaller
    return x


LOOPS: dict[str, Loop] = {
    "linear_attention": _sum,
    "retention": _constant,
    "mamba2_ssd": _scalar,
    "gla": _rows,
    "rwkv6": _before,
    "gsa": _slots,
    "delta_net": _delta,
    "gated_delta_net": _gated_delta,
    "kimi_delta": _kimi,
    "comba": _comba,
    "gated_delta_product": _product,
    "rwkv7": _rank_one,
    "mamba1": _entries,
    "aaren": _softmax,
    "titans_linear": _slopes,
    "s5": _complex,
    "mesa": _solved,
}
"""The loop over tokens for a recurrence of each class."""

LEAN: dict[str, Loop] = {"mamba1": _entries_at_once}
"""Loops without tensors over all tokens."""
