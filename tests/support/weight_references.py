"""Systems with weights, views and branches of their own, written from their definitions, not from the `.attn` files.

q (B, Hq, Nq, dk), k (B, Hkv, Nk, dk), v (B, Hkv, Nk, dv) → out (B, Hq, Nq, dv), and lse (B, Hq, Nq) where a `Result` is
returned: dense, in the tensors' own dtype (one for all of a call) and on their device, differentiable in every real
input. Query head h reads kv head h // (Hq // Hkv). Where there may be fewer queries than keys, the last query stands at
the last key. A row that sees nothing: out 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from score_references import Result, products, weighted


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Where queries (Nq, 1) and keys (Nk) stand, on the device of q."""
    n_q, n_k = q.shape[2], k.shape[2]
    return torch.arange(n_k - n_q, n_k, device=q.device)[:, None], torch.arange(n_k, device=q.device)


def causal(q: Tensor, k: Tensor) -> Tensor:
    """Which pairs (Nq, Nk) see no later key."""
    query, key = positions(q, k)
    return key <= query


def shared(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (B, Hkv, …) as every query head reads them, (B, Hq, …)."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def shares(score: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible keys; 0 throughout a row that sees none."""
    seen = visible.any(-1, keepdim=True)
    return torch.where(visible, torch.softmax(torch.where(visible | ~seen, score, -math.inf), -1), 0)


def normalised(weight: Tensor) -> Tensor:
    """Weights that are nowhere negative, divided by their sum; 0 throughout a row of zeros."""
    total = weight.sum(-1, keepdim=True)
    return torch.div(weight, torch.where(total > 0, total, 1))


def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²)) over the last axis, 0 for 0."""
    square = x.square().mean(-1, keepdim=True)
    return torch.where(square > 0, x * torch.where(square > 0, square, 1).rsqrt(), 0)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, 0 for 0."""
    return rms(x) / math.sqrt(x.shape[-1])


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without the threshold of `F.softplus`, which is wrong by 2e-9."""
    return torch.logaddexp(x, torch.zeros_like(x))


# --- weights that are no plain softmax --------------------------------------------------------------------------------


def sqa(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Filipek 2025: causal softmax attention of fewer query heads; the heads of the call are all there is to it."""
    return weighted(scale * products(q, k), causal(q, k), v)[0]


def differential(q: Tensor, k: Tensor, v: Tensor, *, weight: Tensor, init: float = 0.8) -> Tensor:
    """Ye et al. 2024; `weight` (Hq) is the finished λ. The norm has no ε and no gain."""
    scale, visible = (q.shape[-1] // 2) ** -0.5, causal(q, k)
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    first, _ = weighted(scale * products(q1, k1), visible, v)
    second, _ = weighted(scale * products(q2, k2), visible, v)
    return (1 - init) * rms(first - weight[:, None, None] * second)


def softplus_shares(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of LSSA, which pairs are visible (Nq, Nk), and how many keys a query sees (Nq, 1)."""
    visible = causal(q, k)
    count = visible.sum(-1, keepdim=True).clamp(min=1).to(q.dtype)
    score = math.log(q.shape[-1]) * count.log() * products(unit(q), unit(k))
    return normalised(torch.where(visible, softplus(score), 0)), visible, count


def softplus_lssa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LSSA: softplus(log d · log n · cos), divided by its sum; n counts the visible keys."""
    weight, _, _ = softplus_shares(q, k)
    return weight @ shared(v, q)


def softplus_lssar(q: Tensor, k: Tensor, v: Tensor, *, power: int = 15, offset: float = 1.0) -> Tensor:
    """LSSAR: relu(n · LSSA - offset) ** power, divided by its sum; no offset in the rows of the first three positions.

    A row whose weights are all cut off gives 0.
    """
    weight, visible, count = softplus_shares(q, k)
    query, _ = positions(q, k)
    sharp = torch.where(visible, torch.relu(count * weight - offset * (query >= 3).to(q.dtype)), 0)
    peak = sharp.detach().amax(-1, keepdim=True)  # divides out; without it the power overflows
    return normalised((sharp / torch.where(peak > 0, peak, 1)) ** power) @ shared(v, q)


def affine_scaled(q: Tensor, k: Tensor, v: Tensor, *, scale: float, alpha: Tensor, beta: Tensor) -> Tensor:
    """Affine-scaled attention: (alpha softmax + beta) v over the visible keys; `alpha` and `beta` (B, Hq, Nq)."""
    visible = causal(q, k)
    weight = alpha[..., None] * shares(scale * products(q, k), visible) + beta[..., None]
    return torch.where(visible, weight, 0) @ shared(v, q)


def linear_weights(q: Tensor, k: Tensor, v: Tensor, *, fq: Tensor, fk: Tensor) -> Tensor:
    """Causal sum of (fq · fk) v without normaliser; `fq` (B, Hq, Nq, r), `fk` (B, Hkv, Nk, r)."""
    return torch.where(causal(q, k), products(fq, fk), 0) @ shared(v, q)


def normalised_linear(q: Tensor, k: Tensor, v: Tensor, *, fq: Tensor, fk: Tensor) -> Tensor:
    """Causal sum of (softplus(fq) · softplus(fk)) v, divided by the sum of the weights."""
    weight = products(softplus(fq), softplus(fk))
    return normalised(torch.where(causal(q, k), weight, 0)) @ shared(v, q)


def landmark(q: Tensor, k: Tensor, v: Tensor, *, scale: float, block: int) -> Tensor:
    """Mohtashami & Jaggi 2023, grouped softmax in training; a landmark is the last of every block + 1 tokens.

    A query shares itself out over the tokens of its own block and the landmarks of earlier blocks; a landmark passes
    its share on to the tokens of its block. The landmark of the own block takes no part, also in its own row.
    """
    query, key = positions(q, k)
    own, mark = query // (block + 1) == key // (block + 1), key % (block + 1) == block
    score, v = scale * products(q, k), shared(v, q)
    share = shares(score, (key <= query) & (own != mark))
    out = torch.where(mark, 0, share) @ v
    for door in key[mark].tolist():
        room = slice(door - block, door)
        out = out + share[..., door : door + 1] * (torch.softmax(score[..., room], -1) @ v[:, :, room])
    return out


def local_linear(q: Tensor, k: Tensor, v: Tensor, *, scale: float, ridge: float) -> Tensor:
    """LLA: causal local linear regression around every query, solved exactly.

    With weights of sum 1 the ridge needs no factor ω; the sign · δ of the code's denominator is left out.
    """
    weight = shares(scale * products(q, k), causal(q, k))
    d = shared(k, q)[:, :, None] - q[:, :, :, None]
    mu = torch.einsum("bhqk,bhqkd->bhqd", weight, d)
    sigma = torch.einsum("bhqk,bhqkd,bhqke->bhqde", weight, d, d)
    rho: Tensor = torch.linalg.solve(sigma + ridge * torch.eye(q.shape[-1], dtype=q.dtype, device=q.device), mu)
    tilt = 1 - torch.einsum("bhqd,bhqkd->bhqk", rho, d)
    return (weight * tilt / (1 - (mu * rho).sum(-1, keepdim=True))) @ shared(v, q)


# --- windows of a grid, row by row (frame by frame) -------------------------------------------------------------------


def grid(*sizes: int, device: torch.device) -> list[Tensor]:
    """The coordinates of the tokens of a grid along each of its axes."""
    return [axis.flatten() for axis in torch.meshgrid([torch.arange(n, device=device) for n in sizes], indexing="ij")]


def zero_padded(x: Tensor, height: int, width: int, before: int, below: int, right: int) -> Tensor:
    """The image x (B, H, height · width, d) with `before` zero rows and columns before it, others behind."""
    image = x.reshape(*x.shape[:2], height, width, x.shape[-1])
    return F.pad(image, (0, 0, before, right, before, below)).flatten(2, 3)


def davit_window(q: Tensor, k: Tensor, v: Tensor, *, scale: float, height: int, width: int, window: int = 7) -> Tensor:
    """Ding et al. 2022: windows side by side; the zero keys that fill the last ones take part."""
    below, right = -height % window, -width % window
    k, v = (zero_padded(x, height, width, 0, below, right) for x in (k, v))
    (qy, qx), (ky, kx) = grid(height, width, device=q.device), grid(height + below, width + right, device=q.device)
    same = (qy[:, None] // window == ky // window) & (qx[:, None] // window == kx // window)
    return weighted(scale * products(q, k), same, v)[0]


def davit_channel(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Ding et al. 2022: channel i of K attends to the channels j of V and mixes the channels j of Q; dv = dk."""
    k, v = shared(k, q), shared(v, q)
    weight = torch.softmax(scale * torch.einsum("bhni,bhnj->bhij", k, v), -1)
    return torch.einsum("bhij,bhnj->bhni", weight, q)


def halo(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    height: int,
    width: int,
    block: int,
    halo: int,
    row: Tensor,
    col: Tensor,
) -> Tensor:
    """HaloNet: a block sees itself and a halo around it; `row` and `col` (2 · (block + halo) - 1, dk).

    Every query sees (block + 2 · halo)² keys. Those outside the image are zero keys, also behind a block that the image
    does not fill (the draft pattern ends `halo` behind the image, its definition knows no such end).
    """
    below, right = -height % block + halo, -width % block + halo
    k, v = (zero_padded(x, height, width, halo, below, right) for x in (k, v))
    qy, qx = (axis[:, None] for axis in grid(height, width, device=q.device))
    ky, kx = (axis - halo for axis in grid(halo + height + below, halo + width + right, device=q.device))
    from_y, from_x = ky - qy // block * block, kx - qx // block * block
    visible = (-halo <= from_y) & (from_y < block + halo) & (-halo <= from_x) & (from_x < block + halo)
    mid = block + halo - 1
    score = scale * products(q, k)
    for table, offset in ((row, ky - qy), (col, kx - qx)):
        score = score + torch.einsum("bhqd,qkd->bhqk", q, table[(offset + mid).clamp(0, 2 * mid)])
    return weighted(score, visible, v)[0]


def shifted_windows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sizes: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    """Attention within the windows of a 3-D grid, whose borders lie `shift` before the multiples of `window`."""
    axes = grid(*sizes, device=q.device)
    cells = [(axis + first) // length for axis, first, length in zip(axes, shift, window, strict=True)]
    same = torch.stack([cell[:, None] == cell for cell in cells]).all(0)
    return weighted(scale * products(q, k), same, v)[0]


def lingen_temporal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    frames: int,
    height: int,
    width: int,
    window: Sequence[int],
    layer: int = 0,
) -> Tensor:
    """LinGen's TESA: small windows (time, row, column), shifted by half a window along time on odd layers."""
    shift = (window[0] // 2 * (layer % 2), 0, 0)
    return shifted_windows(q, k, v, scale, (frames, height, width), window, shift)


def videofactory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    frames: int,
    height: int,
    width: int,
    window: Sequence[int],
    layer: int = 0,
) -> Tensor:
    """VideoFactory: queries of one stream, keys and values of the other, windows shifted on odd layers along all axes.

    The caller swaps the streams from layer to layer.
    """
    shift = [length // 2 * (layer % 2) for length in window]
    return shifted_windows(q, k, v, scale, (frames, height, width), window, shift)


# --- summaries, branches and other views ------------------------------------------------------------------------------


def hierarchical(q: Tensor, k: Tensor, v: Tensor, *, group: int) -> Tensor:
    """Hierarchical self-attention: groups of `group` tokens below one root; q and k are unit vectors times sqrt(d).

    The tokens are the leaves (φ = ∞) and their energies those of any siblings, ψ = d - q · k / d; the inside of a group
    is plain softmax attention with factor d^-1/2, a token sees itself. The draft pattern differs: it takes the means of
    q and k as they come, and neither divides the products of tokens by d nor scales those inside a group.
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
    """Attention over depth: `x` (B, N, L, dv) mixed by the softmax over L of scale · w · rms(x), `w` (dv); no ε.

    → (B, N, dv), or (B, heads, N, dv), the same for every head.
    """
    weight = torch.softmax(scale * (rms(x) @ w), -1)
    out = torch.einsum("bnl,bnld->bnd", weight, x)
    return out if heads is None else out[:, None].expand(-1, heads, -1, -1)


def first_largest(x: Tensor) -> Tensor:
    """The largest over dimension 2, entry by entry; of equal ones the first, which has all of the gradient."""
    return x.gather(2, x.argmax(2, keepdim=True))


def combiner(q: Tensor, k: Tensor, v: Tensor, *, scale: float, segment: int) -> Result:
    """Ren et al. 2021, fixed, pooled by the maximum: the own segment causally and a summary of each earlier one.

    A summary counts as one key, whatever the length of its segment; one softmax over all.
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
    """MonarchAttention, T = 1, of the tokens (m, b) of a grid: R within the rows, then L within the columns."""
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


def longformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int,
    dilation: Sequence[int],
    is_global: Tensor,
    qg: Tensor,
    kg: Tensor,
    vg: Tensor,
) -> Tensor:
    """Beltagy et al. 2020: `window` keys each side, `dilation` (Hq) apart, and the global tokens, `is_global` (B, N).

    A global token sees all by the projections `qg`, `kg`, `vg` (B, Hq, N, …); others see it by its plain k and v.
    """
    query, key = positions(q, k)
    offset = key - query
    near = torch.stack([(offset.abs() <= window * step) & (offset % step == 0) for step in dilation])
    local, _ = weighted(scale * products(q, k), near | is_global[:, None, None], v)
    whole, _ = weighted(scale * products(qg, kg), torch.ones_like(offset, dtype=torch.bool), vg)
    return torch.where(is_global[:, None, :, None], whole, local)


def autoformer_lags(q: Tensor, k: Tensor, v: Tensor, *, lag: Tensor, summed: bool = False) -> Tensor:
    """Wu et al. 2021, the lags given: `lag` (B, L). Softmax over them of how well k, rolled by the lag, agrees with q.

    The agreement is a mean over heads, channels and positions; with `summed` a sum over positions, which is what the
    inverse Fourier transform of the definition gives.
    """
    k, v, out = shared(k, q), shared(v, q), []
    for item, lags in enumerate(lag.tolist()):
        agreement = torch.stack([(q[item] * k[item].roll(step, 1)).mean() for step in lags])
        weight = torch.softmax(agreement * (q.shape[2] if summed else 1), -1)
        out.append(torch.einsum("l,lhnd->hnd", weight, torch.stack([v[item].roll(-step, 1) for step in lags])))
    return torch.stack(out)


def gated_branches(q: Tensor, k: Tensor, v: Tensor, *, scale: float, gate: Tensor, block: int, window: int) -> Tensor:
    """Means of whole past blocks, all keys, and a window, each with a softmax of its own; `gate` (B, Hq, Nq, 3).

    A block is seen from its last token on; the gates come finished, no sigmoid here.
    """
    query, key = positions(q, k)
    whole = k.shape[2] // block
    mean_k, mean_v = (x[:, :, : whole * block].reshape(*x.shape[:2], whole, block, x.shape[-1]).mean(3) for x in (k, v))
    past = (torch.arange(whole, device=q.device) + 1) * block <= query + 1
    coarse, _ = weighted(scale * products(q, mean_k), past, mean_v)
    full, _ = weighted(scale * products(q, k), key <= query, v)
    near, _ = weighted(scale * products(q, k), (key <= query) & (query - key < window), v)
    return (gate[..., None, :] * torch.stack([coarse, full, near], -1)).sum(-1)
