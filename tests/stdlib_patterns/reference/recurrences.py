"""Recurrences written from their papers, token by token, as an oracle for the compiler.

q, k (B, H, T, dk), v (B, H, T, dv), gates and similar (B, T, H) or (B, T, H, size), learned tensors (H, …) → out
(B, H, T, dv) and the states after the last token, in the tensors' own dtype (pass float64) and differentiable. Every
query head has its own key. A state S is (B, H, dk, dv); `state` holds the states before the first token, None for an
empty memory. `scale` is used only if the system's definition has dk^-1/2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.scores import alibi_slopes

States = tuple[Tensor, ...]
Result = tuple[Tensor, States]


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def read(S: Tensor, q: Tensor) -> Tensor:
    """Compute Sᵀ q."""
    return torch.einsum("...kv,...k->...v", S, q)


def first(state: States | None, like: Tensor, *sizes: tuple[int, ...]) -> States:
    """Return the given states, or zeros (B, H, *size) for each size."""
    return state if state is not None else tuple(like.new_zeros(*like.shape[:2], *size) for size in sizes)


def memory(state: States | None, q: Tensor, v: Tensor) -> Tensor:
    """Return the first state (B, H, dk, dv) of a system that has only this state."""
    (S,) = first(state, q, (q.shape[-1], v.shape[-1]))
    return S


def sequence(rows: list[Tensor], v: Tensor) -> Tensor:
    """Join the outputs (B, H, dv) of successive tokens to (B, H, T, dv)."""
    return torch.stack(rows, 2) if rows else torch.zeros_like(v)


def over_heads(values: list[float], like: Tensor) -> Tensor:
    """Return one number per head, in a shape that multiplies a state."""
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
    """Compute e^(x - top), 0 with gradient 0 if x is -inf."""
    nothing = x == -math.inf
    return torch.where(nothing, 0, torch.where(nothing, 0, x - top).exp())


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """Compute log(e^a + e^b), with finite gradients if a or b is -inf."""
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
    """Peng et al. 2024, "Eagle and Finch": read before the update, the current token by its bonus u (H, dk)."""
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
    """Return the level of the bucket of token t that holds token j ≤ t."""
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
    """Guo et al. 2025, "Log-Linear Attention", all pairs: level (B, T, H, L); states are neither taken nor returned."""
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
    """Take one step of size beta (B, H) towards Sᵀ k = v."""
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
    """Hu et al. 2025, "Comba": the value stored at p = σ(decay) k is replaced; decay, D (H) correct key and query."""
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
