"""More recurrences written from their papers: regression at test time, other scans, two branches, orders on a grid.

Shapes are as in `reference.recurrences`; `REFERENCES` at the end lists the systems of both modules by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from reference.memories import hgrn, mamba_mixer, memora_linear, moneta_linear, ttt_linear
from reference.recurrences import (
    Result,
    States,
    comba,
    delta_net,
    document_linear,
    exp_below,
    first,
    gated_delta_net,
    gated_delta_product,
    gla,
    gsa,
    hgrn2,
    kimi_delta,
    lightnet,
    lightning,
    linear_attention,
    log_linear,
    mamba2_ssd,
    memory,
    outer,
    read,
    retention,
    rwkv6,
    rwkv7,
    sequence,
)
from reference.regression import regression_at_test_time

# --- regression at test time ------------------------------------------------------------------------------------------


def mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    g: Tensor,
    beta: Tensor,
    ridge: Tensor,
) -> Result:
    """Von Oswald et al. 2025, "MesaNet": states (A, Bm), solved exactly with the ridge (H, dk), unscaled."""
    dk = q.shape[-1]
    A, Bm = first(state, q, (dk, dk), (dk, v.shape[-1]))
    rows = []
    for t in range(q.shape[2]):
        decay, key = g[:, t, :, None, None].exp(), beta[:, t, :, None] * k[:, :, t]
        A = decay * A + outer(key, k[:, :, t])
        Bm = decay * Bm + outer(key, v[:, :, t])
        rows.append(read(Bm, torch.linalg.solve(A + torch.diag_embed(ridge), q[:, :, t, :, None])[..., 0]))
    return sequence(rows, v), (A, Bm)


def titans_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    rate: Tensor,
    hold: Tensor,
    forget: Tensor,
    chunk: int = 64,
) -> Result:
    """Behrouz et al. 2025, "Titans", with a matrix as the memory: states (M, P), gradients at the chunk's first M."""
    size = (q.shape[-1], v.shape[-1])
    M, P = first(state, q, size, size)
    M0 = M
    rows = []
    for t in range(q.shape[2]):
        M0 = M if t % chunk == 0 else M0
        slope = 2 * outer(k[:, :, t], read(M0, k[:, :, t]) - v[:, :, t])
        P = hold[:, t, :, None, None] * P - rate[:, t, :, None, None] * slope
        M = (1 - forget[:, t, :, None, None]) * M + P
        rows.append(read(M, q[:, :, t]))
    return sequence(rows, v), (M, P)


def yaad_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    rate: Tensor,
    hold: Tensor,
    delta: Tensor,
) -> Result:
    """Behrouz et al. 2025, "It's All Connected" (Miras), Yaad with a matrix as the memory: Huber's loss."""
    M = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        error, limit = v[:, :, t] - read(M, k[:, :, t]), delta[:, t, :, None]
        size = torch.linalg.vector_norm(error, dim=-1, keepdim=True)
        error = error * torch.where(size > limit, limit / torch.where(size > limit, size, 1), 1)
        M = hold[:, t, :, None, None] * M + outer(rate[:, t, :, None] * k[:, :, t], error)
        rows.append(read(M, q[:, :, t]))
    return sequence(rows, v), (M,)


# --- scans of other elements ------------------------------------------------------------------------------------------


def discrete(L: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return S5's zero-order hold: the transition exp(ΛΔ) and the factor of the inputs, Λ⁻¹ (exp(ΛΔ) - 1)."""
    decay = (L * dt).exp()
    return decay, (decay - 1) / L


def s5(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    L_re: Tensor,
    L_im: Tensor,
    dt: Tensor,
    B_re: Tensor,
    B_im: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    D: Tensor,
) -> Result:
    """Smith et al. 2023, "Simplified State Space Layers": L, dt (H, n), B (H, n, dv), C (H, dv, n); Re x, Im x."""
    A, factor = discrete(torch.complex(L_re, L_im), dt)
    Bc, Cc = torch.complex(B_re, B_im) * factor[..., None], torch.complex(C_re, C_im)
    x = torch.complex(*first(state, v, A.shape[1:], A.shape[1:]))
    rows = []
    for t in range(v.shape[2]):
        x = A * x + torch.einsum("hnv,bhv->bhn", Bc, v[:, :, t].to(Bc.dtype))
        rows.append(2 * torch.einsum("hvn,bhn->bhv", Cc, x).real + D * v[:, :, t])
    return sequence(rows, v), (x.real, x.imag)


def convs5_pointwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    L_re: Tensor,
    L_im: Tensor,
    dt: Tensor,
    C_re: Tensor,
    C_im: Tensor,
    u_re: Tensor,
    u_im: Tensor,
) -> Result:
    """Smith et al. 2023, "ConvSSM", along time: L, dt (H, n), C (H, dv, n), u (B, T, H, n), states Re x, Im x."""
    A, factor = discrete(torch.complex(L_re, L_im), dt)
    u, Cc = torch.complex(u_re, u_im), torch.complex(C_re, C_im)
    x = torch.complex(*first(state, v, A.shape[1:], A.shape[1:]))
    rows = []
    for t in range(u.shape[1]):
        x = A * x + factor * u[:, t]
        rows.append(2 * torch.einsum("hvn,bhn->bhv", Cc, x).real)
    return sequence(rows, v), (x.real, x.imag)


def aaren(q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, w: Tensor) -> Result:
    """Feng et al. 2024, "Attention as an RNN": one learned query w (H, dk), states maximum, sum, weighted values."""
    top, total, acc = first(state, v, (), (), (v.shape[-1],))
    top = top - math.inf if state is None else top
    rows = []
    for t in range(k.shape[2]):
        score, old = scale * (w * k[:, :, t]).sum(-1), top
        top = torch.maximum(old, score)
        keep, add = exp_below(old, top), exp_below(score, top)
        total = keep * total + add
        acc = keep[..., None] * acc + add[..., None] * v[:, :, t]
        rows.append(acc / total[..., None])
    return sequence(rows, v), (top, total, acc)


def selective(S: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor) -> Tensor:
    """Take one step of Mamba: every entry of the state (…, dk, dv) has its own decay."""
    return (dt[..., None, :] * A).exp() * S + outer(k, dt * v)


def mamba1(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, dt: Tensor, A: Tensor, D: Tensor
) -> Result:
    """Gu & Dao 2023, "Mamba": dt (B, T, H, dv), A (H, dk, dv), D (H, dv), unscaled."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        S = selective(S, k[:, :, t], v[:, :, t], dt[:, t], A)
        rows.append(read(S, q[:, :, t]) + D * v[:, :, t])
    return sequence(rows, v), (S,)


# --- two branches -----------------------------------------------------------------------------------------------------


def hybrid_window_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    g: Tensor,
    gate: Tensor,
    window: int,
) -> Result:
    """Gated as in Titans' MAG (Behrouz et al. 2025): a sliding window that includes the query, and a decayed memory.

    States: S, and the keys and values (B, H, fewer than window, size) that are still in the next token's window.
    """
    S, keys, values = first(state, q, (q.shape[-1], v.shape[-1]), (0, q.shape[-1]), (0, v.shape[-1]))
    rows = []
    for t in range(q.shape[2]):
        S = g[:, t, :, None, None].exp() * S + outer(k[:, :, t], v[:, :, t])
        keys, values = torch.cat([keys, k[:, :, t, None]], 2), torch.cat([values, v[:, :, t, None]], 2)
        near = slice(max(keys.shape[2] - window, 0), None)
        seen = torch.softmax(scale * torch.einsum("bhsk,bhk->bhs", keys[:, :, near], q[:, :, t]), -1)
        share = gate[:, t, :, None]
        rows.append(share * read(values[:, :, near], seen) + (1 - share) * scale * read(S, q[:, :, t]))
    rest = slice(max(keys.shape[2] - window + 1, 0), None)
    return sequence(rows, v), (S, keys[:, :, rest], values[:, :, rest])


# --- orders on a grid -------------------------------------------------------------------------------------------------


def route(head: int, height: int, width: int) -> list[int]:
    """Return the order of MHS-VM's head: raster, snake or zigzag along diagonals; every second three are reversed."""
    cells = list(product(range(height), range(width)))
    if head % 3 == 1:
        cells.sort(key=lambda cell: (cell[0], cell[1] if cell[0] % 2 == 0 else -cell[1]))
    if head % 3 == 2:
        cells.sort(key=lambda cell: (sum(cell), cell[0] if sum(cell) % 2 == 0 else cell[1]))
    tokens = [y * width + x for y, x in cells]
    return tokens[::-1] if head // 3 % 2 else tokens


def mhs_vm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    dt: Tensor,
    A: Tensor,
    height: int,
    width: int,
) -> Result:
    """Ji 2024, "MHS-VM": Mamba's scan without D, each head along its own route over the grid."""
    start = memory(state, q, v)
    heads, ends = [], []
    for h in range(q.shape[1]):
        S, rows = start[:, h], {}
        for t in route(h, height, width):
            S = selective(S, k[:, h, t], v[:, h, t], dt[:, t, h], A[h])
            rows[t] = read(S, q[:, h, t])
        heads.append(torch.stack([rows[t] for t in range(q.shape[2])], 1))
        ends.append(S)
    return torch.stack(heads, 1), (torch.stack(ends, 1),)


def spatial_mamba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    dt: Tensor,
    A: Tensor,
    mix: Tensor,
    D: Tensor,
    height: int,
    width: int,
) -> Result:
    """Xiao et al. 2024, "Spatial-Mamba": states of the raster scan mixed over neighbours 1, 3, 5 away, edges repeated.

    mix (H, 3, 3, 3): distance, row, column.
    """
    S = memory(state, q, v)
    states = []
    for t in range(q.shape[2]):
        S = selective(S, k[:, :, t], v[:, :, t], dt[:, t], A)
        states.append(S)
    rows = []
    for y, x in product(range(height), range(width)):
        fused, t = torch.zeros_like(S), y * width + x
        for r, i, j in product(range(3), repeat=3):
            near_y = min(max(y + (2 * r + 1) * (i - 1), 0), height - 1)
            near_x = min(max(x + (2 * r + 1) * (j - 1), 0), width - 1)
            fused = fused + mix[:, r, i, j, None, None] * states[near_y * width + near_x]
        rows.append(read(fused, q[:, :, t]) + D * v[:, :, t])
    return sequence(rows, v), (S,)


def lingen_order(frames: int, height: int, width: int, layer: int) -> list[int]:
    """Return the tokens of a video (frame, row, column) in the order of LinGen's layer, slowest axis first."""
    slow_to_fast = ["tyx", "txy", "yxt", "xyt"][layer % 4]
    cells = [dict(zip("tyx", cell, strict=True)) for cell in product(range(frames), range(height), range(width))]
    cells.sort(key=lambda cell: [cell[axis] for axis in slow_to_fast])
    return [(cell["t"] * height + cell["y"]) * width + cell["x"] for cell in cells]


def lingen_ma(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    g: Tensor,
    frames: int,
    height: int,
    width: int,
    layer: int,
    reviews: int = 0,
) -> Result:
    """Wang et al. 2024, "LinGen", its MA branch: both directions, the leading review tokens first; states of both."""
    size = (q.shape[-1], v.shape[-1])
    order = [*range(reviews), *(reviews + token for token in lingen_order(frames, height, width, layer))]
    ends, out = [], torch.zeros_like(v)
    for start, direction in zip(first(state, q, size, size), (order, order[::-1]), strict=True):
        S, rows = start, {}
        for t in direction:
            S = g[:, t, :, None, None].exp() * S + outer(k[:, :, t], v[:, :, t])
            rows[t] = read(S, q[:, :, t])
        out = out + sequence([rows[t] for t in range(q.shape[2])], v)
        ends.append(S)
    return out, tuple(ends)


# --- index of the systems ---------------------------------------------------------------------------------------------

REFERENCES: dict[str, Callable[..., Result]] = {
    system.__name__: system
    for system in (
        linear_attention,
        retention,
        lightning,
        document_linear,
        mamba2_ssd,
        gla,
        hgrn,
        hgrn2,
        lightnet,
        rwkv6,
        gsa,
        log_linear,
        delta_net,
        gated_delta_net,
        kimi_delta,
        comba,
        gated_delta_product,
        rwkv7,
        mesa,
        titans_linear,
        yaad_linear,
        moneta_linear,
        memora_linear,
        ttt_linear,
        s5,
        convs5_pointwise,
        aaren,
        mamba1,
        hybrid_window_linear,
        mhs_vm,
        spatial_mamba,
        lingen_ma,
        mamba_mixer,
    )
} | {"test_time_regression": regression_at_test_time}
