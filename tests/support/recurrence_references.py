"""Recurrences written from their papers, token by token, to hold the compiler to account.

q, k (B, H, T, dk), v (B, H, T, dv), gates and the like (B, T, H) or (B, T, H, size), learned tensors (H, …) → out
(B, H, T, dv) and the states after the last token, in the tensors' own dtype (give float64) and differentiable. Every
query head has its own key. A state S is (B, H, dk, dv); `state` holds those before the first token, None the empty
memory. `scale` multiplies only where the system's definition has dk^-1/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.regression import regression_at_test_time
from score_references import alibi_slopes

States = tuple[Tensor, ...]
Result = tuple[Tensor, States]


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def read(S: Tensor, q: Tensor) -> Tensor:
    """Sᵀ q."""
    return torch.einsum("...kv,...k->...v", S, q)


def first(state: States | None, like: Tensor, *sizes: tuple[int, ...]) -> States:
    """The states given, or zeros (B, H, *size) for each size."""
    return state if state is not None else tuple(like.new_zeros(*like.shape[:2], *size) for size in sizes)


def memory(state: States | None, q: Tensor, v: Tensor) -> Tensor:
    """The first state (B, H, dk, dv) of a system that has no other."""
    (S,) = first(state, q, (q.shape[-1], v.shape[-1]))
    return S


def sequence(rows: list[Tensor], v: Tensor) -> Tensor:
    """The outputs (B, H, dv) of one token after the other as (B, H, T, dv)."""
    return torch.stack(rows, 2) if rows else torch.zeros_like(v)


def over_heads(values: list[float], like: Tensor) -> Tensor:
    """One number per head, to multiply a state with."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


# --- decay by a constant or by a gate ---------------------------------------------------------------------------------


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, normalised: bool = True
) -> Result:
    """Katharopoulos et al. 2020, "Transformers are RNNs"; states (S, z) if normalised, where a scale would cancel."""
    dk, dv = q.shape[-1], v.shape[-1]
    S, *z = first(state, q, (dk, dv), (dk,)) if normalised else first(state, q, (dk, dv))
    rows = []
    for t in range(q.shape[2]):
        query, key = F.elu(q[:, :, t]) + 1, F.elu(k[:, :, t]) + 1
        S = S + outer(key, v[:, :, t])
        z = [total + key for total in z]
        rows.append(read(S, query) / (query * z[0]).sum(-1, keepdim=True) if z else scale * read(S, query))
    return sequence(rows, v), (S, *z)


def retention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None) -> Result:
    """Sun et al. 2023, "Retentive Network": without its norm, gate and positions."""
    S = memory(state, q, v)
    decay = over_heads([1 - 2.0 ** (-5 - head) for head in range(q.shape[1])], v)
    rows = []
    for t in range(q.shape[2]):
        S = decay * S + outer(k[:, :, t], v[:, :, t])
        rows.append(scale * read(S, q[:, :, t]))
    return sequence(rows, v), (S,)


def lightning(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, layer: int = 0, layers: int = 24
) -> Result:
    """Qin et al. 2023, "TransNormerLLM", and 2024, "Lightning Attention-2": unscaled."""
    S = memory(state, q, v)
    depth = 1 - layer / (layers - 1) + 1e-5
    decay = over_heads([math.exp(-slope * depth) for slope in alibi_slopes(q.shape[1])], v)
    rows = []
    for t in range(q.shape[2]):
        S = decay * S + outer(k[:, :, t], v[:, :, t])
        rows.append(read(S, q[:, :, t]))
    return sequence(rows, v), (S,)


def document_linear(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, g: Tensor, fresh: Tensor
) -> Result:
    """Packed documents under the scalar gate of Yang et al. 2024: the memory is emptied before a fresh token (B, T)."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        S = torch.where(fresh[:, t, None, None, None], 0, S)
        S = g[:, t, :, None, None].exp() * S + outer(k[:, :, t], v[:, :, t])
        rows.append(scale * read(S, q[:, :, t]))
    return sequence(rows, v), (S,)


def mamba2_ssd(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, g: Tensor, dt: Tensor, D: Tensor
) -> Result:
    """Dao & Gu 2024, "Transformers are SSMs": g, dt (B, T, H), D (H), unscaled."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        S = g[:, t, :, None, None].exp() * S + outer(dt[:, t, :, None] * k[:, :, t], v[:, :, t])
        rows.append(read(S, q[:, :, t]) + D[:, None] * v[:, :, t])
    return sequence(rows, v), (S,)


def gla(q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, g: Tensor) -> Result:
    """Yang et al. 2024, "Gated Linear Attention Transformers": g (B, T, H, dk)."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        S = g[:, t, :, :, None].exp() * S + outer(k[:, :, t], v[:, :, t])
        rows.append(scale * read(S, q[:, :, t]))
    return sequence(rows, v), (S,)


def hgrn2(q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, f: Tensor) -> Result:
    """Qin et al. 2024, "HGRN2": f (B, T, H, dk) in (0, 1) makes decay and key, k is ignored, unscaled."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        S = f[:, t, :, :, None] * S + outer(1 - f[:, t], v[:, :, t])
        rows.append(read(S, q[:, :, t]))
    return sequence(rows, v), (S,)


def exp_below(x: Tensor, top: Tensor) -> Tensor:
    """e^(x - top), 0 with gradient 0 where x is -inf."""
    nothing = x == -math.inf
    return torch.where(nothing, 0, torch.where(nothing, 0, x - top).exp())


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), with finite gradients where a or b is -inf."""
    top = torch.maximum(a, b).detach()
    return top + torch.where(top == -math.inf, 1, exp_below(a, top) + exp_below(b, top)).log()


def lightnet(q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None) -> Result:
    """Qin et al. 2024, "You Only Scan Once": z (B, H, dk) sums the keys in the logarithm, states (z, S), unscaled."""
    z, S = first(state, q, (q.shape[-1],), (q.shape[-1], v.shape[-1]))
    z = z - math.inf if state is None else z
    rows = []
    for t in range(q.shape[2]):
        key, old = k[:, :, t], z
        z = log_add(old, key)
        S = exp_below(old, z)[..., None] * S + outer(exp_below(key, z), v[:, :, t])
        rows.append(read(S, F.silu(q[:, :, t])))
    return sequence(rows, v), (z, S)


def rwkv6(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, g: Tensor, u: Tensor
) -> Result:
    """Peng et al. 2024, "Eagle and Finch": read before the update, the own token by its bonus u (H, dk)."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        rows.append(scale * read(S + outer(u * k[:, :, t], v[:, :, t]), q[:, :, t]))
        S = g[:, t, :, :, None].exp() * S + outer(k[:, :, t], v[:, :, t])
    return sequence(rows, v), (S,)


def gsa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, g: Tensor, s: Tensor) -> Result:
    """Zhang et al. 2024, "Gated Slot Attention": g, s (B, T, H, m), states of keys (dk, m) and of values (m, dv)."""
    slots = s.shape[-1]
    K, V = first(state, q, (q.shape[-1], slots), (slots, v.shape[-1]))
    rows = []
    for t in range(q.shape[2]):
        K = g[:, t, :, None, :].exp() * K + outer(k[:, :, t], s[:, t])
        V = g[:, t, :, :, None].exp() * V + outer(s[:, t], v[:, :, t])
        rows.append(read(V, torch.softmax(scale * read(K, q[:, :, t]), -1)))
    return sequence(rows, v), (K, V)


def fenwick_level(t: int, j: int) -> int:
    """The level of the bucket of token t that holds token j ≤ t."""
    if j == t:
        return 0
    level = 1
    while True:
        size = 2 ** (level - 1)
        end = t - t % size
        if t % (2 * size) >= size and end - size <= j < end:
            return level
        level += 1


def log_linear(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, g: Tensor, level: Tensor
) -> Result:
    """Guo et al. 2025, "Log-Linear Attention", all pairs: level (B, T, H, L); neither takes nor gives states."""
    assert state is None
    rows = []
    for t in range(q.shape[2]):
        row = torch.zeros_like(v[:, :, t])
        for j in range(t + 1):
            score = scale * (q[:, :, t] * k[:, :, j]).sum(-1) * g[:, j + 1 : t + 1].sum(1).exp()
            row = row + (level[:, t, :, fenwick_level(t, j)] * score)[..., None] * v[:, :, j]
        rows.append(row)
    return sequence(rows, v), ()


# --- delta rules ------------------------------------------------------------------------------------------------------


def delta_step(S: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """One step of size beta (B, H) towards Sᵀ k = v."""
    return S + outer(k, beta[..., None] * (v - read(S, k)))


def delta_net(q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, beta: Tensor) -> Result:
    """Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight Programmers"; Yang et al. 2024."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        S = delta_step(S, k[:, :, t], v[:, :, t], beta[:, t])
        rows.append(scale * read(S, q[:, :, t]))
    return sequence(rows, v), (S,)


def gated_delta_net(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, g: Tensor, beta: Tensor
) -> Result:
    """Yang et al. 2025, "Gated Delta Networks": g (B, T, H), decay before the delta step."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        S = delta_step(g[:, t, :, None, None].exp() * S, k[:, :, t], v[:, :, t], beta[:, t])
        rows.append(scale * read(S, q[:, :, t]))
    return sequence(rows, v), (S,)


def kimi_delta(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: States | None = None, g: Tensor, beta: Tensor
) -> Result:
    """Kimi Team 2025, "Kimi Linear": g (B, T, H, dk)."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        S = delta_step(g[:, t, :, :, None].exp() * S, k[:, :, t], v[:, :, t], beta[:, t])
        rows.append(scale * read(S, q[:, :, t]))
    return sequence(rows, v), (S,)


def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    g: Tensor,
    beta: Tensor,
    decay: Tensor,
    D: Tensor,
    correct: bool = True,
) -> Result:
    """Hu et al. 2025, "Comba": what stands under p = σ(decay) k is replaced; decay, D (H) correct key and query."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        p = torch.sigmoid(decay)[:, None] * k[:, :, t]
        S = g[:, t, :, None, None].exp() * S
        S = S + outer(k[:, :, t], beta[:, t, :, None] * (v[:, :, t] - read(S, p)))
        rows.append(scale * read(S, q[:, :, t] - D[:, None] * p if correct else q[:, :, t]))
    return sequence(rows, v), (S,)


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    g: Tensor,
    beta: Tensor,
    ks: Tensor,
    vs: Tensor,
) -> Result:
    """Siems et al. 2025, "DeltaProduct": one decay, then n steps with ks, vs (B, T, H, n, size), k and v ignored."""
    S = memory(state, q, vs)
    rows = []
    for t in range(q.shape[2]):
        S = g[:, t, :, None, None].exp() * S
        for step in range(beta.shape[-1]):
            S = delta_step(S, ks[:, t, :, step], vs[:, t, :, step], beta[:, t, :, step])
        rows.append(scale * read(S, q[:, :, t]))
    return sequence(rows, v), (S,)


def rwkv7(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    state: States | None = None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    r_k: Tensor,
) -> Result:
    """Peng et al. 2025, "RWKV-7 Goose": decay w in (0, 1), a, b (B, T, H, dk), bonus r_k (H, dk), unscaled."""
    S = memory(state, q, v)
    rows = []
    for t in range(q.shape[2]):
        S = w[:, t, :, :, None] * S + outer(b[:, t], read(S, a[:, t])) + outer(k[:, :, t], v[:, :, t])
        bonus = (q[:, :, t] * r_k * k[:, :, t]).sum(-1, keepdim=True)
        rows.append(read(S, q[:, :, t]) + bonus * v[:, :, t])
    return sequence(rows, v), (S,)


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
    """Behrouz et al. 2025, "Titans", with a matrix for a memory: states (M, P), gradients at the chunk's first M."""
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
    """Behrouz et al. 2025, "It's All Connected" (Miras), Yaad with a matrix for a memory: Huber's loss."""
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
    """S5's zero-order hold: the transition exp(ΛΔ) and what inputs are multiplied by, Λ⁻¹ (exp(ΛΔ) - 1)."""
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
    """One step of Mamba: every entry of the state (…, dk, dv) has its own decay."""
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
    """Gated as in Titans' MAG (Behrouz et al. 2025): a sliding window, its own token counted, and a decayed memory.

    States: S, and the keys and values (B, H, fewer than window, size) that the next token's window may still hold.
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
    """The order of MHS-VM's head: raster, snake or zigzag along the diagonals, backwards for every other three."""
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
    """The tokens of a video (frame, row, column) in the order of LinGen's layer, slowest axis first."""
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
    """Wang et al. 2024, "LinGen", its MA branch: there and back, the leading review tokens first; states of both."""
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


# --- all of them -----------------------------------------------------------------------------------------------------

REFERENCES: dict[str, Callable[..., Result]] = {
    system.__name__: system
    for system in (
        linear_attention,
        retention,
        lightning,
        document_linear,
        mamba2_ssd,
        gla,
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
        s5,
        convs5_pointwise,
        aaren,
        mamba1,
        hybrid_window_linear,
        mhs_vm,
        spatial_mamba,
        lingen_ma,
    )
} | {"test_time_regression": regression_at_test_time}
