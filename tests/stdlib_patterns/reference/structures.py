"""Patterns with their own views, summaries and branches, written from their definitions, not from the `.attn` files.

q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → out (B, Hq, Nq, dv), and lse (B, Hq, Nq) where a `Result` is
returned: dense, in the tensors' own dtype (one for a whole call) and on their device, differentiable in every real
input. The last query is at the last key. A row without visible keys has out 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference.attention import Result, causal, positions, products, rms, shared, shares, unit, weighted


def sqa(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Filipek 2025: causal softmax attention of fewer query heads; only the heads of the call make the difference."""
    return weighted(scale * products(q, k), causal(q, k), v)[0]


def differential(q: Tensor, k: Tensor, v: Tensor, *, weight: Tensor, init: float = 0.8) -> Tensor:
    """Ye et al. 2024; `weight` (Hq) is the finished λ. The norm has no ε and no gain."""
    scale, visible = (q.shape[-1] // 2) ** -0.5, causal(q, k)
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    first, _ = weighted(scale * products(q1, k1), visible, v)
    second, _ = weighted(scale * products(q2, k2), visible, v)
    return (1 - init) * rms(first - weight[:, None, None] * second)


def davit_channel(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Ding et al. 2022: channel i of K attends to the channels j of V and mixes the channels j of Q; dv = dk."""
    k, v = shared(k, q), shared(v, q)
    weight = torch.softmax(scale * torch.einsum("bhni,bhnj->bhij", k, v), -1)
    return torch.einsum("bhij,bhnj->bhni", weight, q)


def hierarchical(q: Tensor, k: Tensor, v: Tensor, *, group: int) -> Tensor:
    """Hierarchical self-attention: groups of `group` tokens below one root; q and k are unit vectors times sqrt(d).

    The tokens are the leaves (φ = ∞), whose energies are as for all siblings, ψ = d - q · k / d; the inside of a group
    is plain softmax attention with factor d^-1/2, in which a token sees itself. The draft pattern differs: it uses the
    means of q and k unchanged, does not divide products of tokens by d and does not scale those inside a group.
    """
    d, n = q.shape[-1], q.shape[2]
    q, k, v = unit(q) * d**0.5, shared(unit(k), q) * d**0.5, shared(v, q)
    groups = [slice(first, min(first + group, n)) for first in range(0, n, group)]
    mean_q, mean_k, mean_v = (torch.stack([x[:, :, b].mean(2) for b in groups], 2) for x in (q, k, v))
    size = torch.tensor([b.stop - b.start for b in groups], dtype=q.dtype, device=q.device)
    energy = d - products(mean_q, mean_k) / d
    out = []
    for index, b in enumerate(groups):
        others = torch.arange(len(groups), device=q.device) != index
        score, value = size.log() - energy[:, :, index], mean_v[:, :, None]
        inside = torch.softmax(products(q[:, :, b], k[:, :, b]) * d**-0.5, -1) @ v[:, :, b]
        visible = torch.ones_like(others)
        if b.stop - b.start == 1:
            visible = others  # no siblings: exp(-φ) is 0
        else:
            itself = torch.eye(b.stop - b.start, dtype=torch.bool, device=q.device)
            among = torch.where(itself, -math.inf, products(q[:, :, b], k[:, :, b]) / d - d)
            score = torch.where(others, score, torch.logsumexp(among, -1).mean(-1, keepdim=True))
        value = torch.where(others[:, None], value, inside[:, :, :, None])
        out.append(torch.einsum("bhc,bhqcd->bhqd", shares(score, visible), value))
    return torch.cat(out, 2)


def attention_residual(x: Tensor, *, w: Tensor, scale: float, heads: int | None = None) -> Tensor:
    """Compute attention over depth: mix `x` (B, N, L, dv) by the softmax over L of scale · w · rms(x), `w` (dv); no ε.

    → (B, N, dv), or (B, heads, N, dv), equal for every head.
    """
    weight = torch.softmax(scale * (rms(x) @ w), -1)
    out = torch.einsum("bnl,bnld->bnd", weight, x)
    return out if heads is None else out[:, None].expand(-1, heads, -1, -1)


def first_largest(x: Tensor) -> Tensor:
    """Return the elementwise maximum over dimension 2; the first of equal entries has the whole gradient."""
    return x.gather(2, x.argmax(2, keepdim=True))


def combiner(q: Tensor, k: Tensor, v: Tensor, *, scale: float, segment: int) -> Result:
    """Ren et al. 2021, fixed, pooled by the maximum: the own segment causally and a summary of each earlier one.

    A summary counts as one key, whatever the length of its segment; one softmax covers keys and summaries.
    """
    query, key = positions(q, k)
    keys, values = [shared(k, q)], [shared(v, q)]
    visible = [(key <= query) & (query // segment == key // segment)]
    for c in range(k.shape[2] // segment):
        q_c, k_c, v_c = (x[:, :, c * segment : (c + 1) * segment] for x in (q, keys[0], values[0]))
        keys.append(first_largest(k_c))
        values.append(torch.softmax(scale * products(first_largest(q_c), k_c), -1) @ v_c)
        visible.append(query // segment > c)
    return weighted(scale * products(q, torch.cat(keys, 2)), torch.cat(visible, -1), torch.cat(values, 2))


def monarch(q: Tensor, k: Tensor, v: Tensor, *, scale: float, rows: int, cols: int) -> Tensor:
    """MonarchAttention, T = 1, on the tokens (m, b) of a grid: R within the rows, then L within the columns."""
    q, k, v = (x.reshape(*x.shape[:2], rows, cols, -1) for x in (q, shared(k, q), shared(v, q)))
    log_r = torch.log_softmax(scale * torch.einsum("zhmbd,zhmcd->zhmbc", q, k), -1)
    r = log_r.exp()
    a_l = scale * (r @ k)
    c_l = (r * log_r).sum(-1)
    score = torch.einsum("zhmbd,zhnbd->zhbmn", q, a_l) - c_l.transpose(2, 3)[:, :, :, None]
    return torch.einsum("zhbmn,zhnbd->zhmbd", torch.softmax(score, -1), r @ v).flatten(2, 3)


def monarch_rt(q: Tensor, k: Tensor, v: Tensor, *, scale: float, frames: int, height: int, width: int) -> Tensor:
    """MonarchRT, one iteration: R[a,f,k,j,·] over the row k of frame f, L[a,i,j] over frames f and rows k."""
    grid = frames, height, width
    q, k, v = (x.reshape(*x.shape[:2], *grid, -1) for x in (q, shared(k, q), shared(v, q)))
    log_r = torch.log_softmax(scale * torch.einsum("zhakjd,zhfkld->zhafkjl", q, k), -1)
    r = log_r.exp()
    a_l, y = (torch.einsum("zhafkjl,zhfkld->zhafkjd", r, x) for x in (k, v))
    c_l = (r * log_r).sum(-1)
    score = scale * torch.einsum("zhaijd,zhafkjd->zhaijfk", q, a_l) - c_l.permute(0, 1, 2, 5, 3, 4)[:, :, :, None]
    left = torch.softmax(score.flatten(-2), -1).reshape(score.shape)
    return torch.einsum("zhaijfk,zhafkjd->zhaijd", left, y).flatten(2, 4)


def autoformer_lags(q: Tensor, k: Tensor, v: Tensor, *, lag: Tensor, summed: bool = False) -> Tensor:
    """Wu et al. 2021, with given lags: `lag` (B, L). Softmax over lags of the agreement of q with k rolled by the lag.

    The agreement is a mean over heads, channels and positions; with `summed` a sum over positions, as computed by the
    inverse Fourier transform of the definition.
    """
    k, v, out = shared(k, q), shared(v, q), []
    for item, lags in enumerate(lag.tolist()):
        agreement = torch.stack([(q[item] * k[item].roll(step, 1)).mean() for step in lags])
        weight = torch.softmax(agreement * (q.shape[2] if summed else 1), -1)
        out.append(torch.einsum("l,lhnd->hnd", weight, torch.stack([v[item].roll(-step, 1) for step in lags])))
    return torch.stack(out)
