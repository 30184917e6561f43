"""The linear recurrence token by token, from its equations: the oracle of the chunk forms.

q (B, H, T, R), k (B, H, N, R), v (B, H, N, C), N = T · micro; out (B, H, T, C) and the final state (B, H, R, C), in the
tensors' own dtype, differentiable. A correction is (u, r, sees), u and r (B, H, N, R), `sees` "decayed" or "old".
"""

from __future__ import annotations

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]
Correction = tuple[Tensor, Tensor, str]


def step(
    state: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, correction: tuple[Tensor, Tensor, str] | None
) -> Tensor:
    """Take one micro-step: all tensors are (B, H, ·), `rows` and `columns` log decays."""
    decayed = rows.exp()[..., :, None] * state * columns.exp()[..., None, :]
    result = decayed
    if correction:
        u, r, sees = correction
        read = (r[..., :, None] * (decayed if sees == "decayed" else state)).sum(-2)
        result = result + u[..., :, None] * read[..., None, :]
    return result + k[..., :, None] * v[..., None, :]


def full_gate(gate: Tensor | None, k: Tensor) -> Tensor:
    """Expand a gate of any shape to (B, H, N, R)."""
    if gate is None:
        return torch.zeros_like(k)
    if gate.ndim == 1:
        gate = gate[None, :, None]
    return gate.expand_as(k) if gate.ndim == 4 else gate[..., None].expand_as(k)


def token_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None = None,
    gate_columns: Tensor | None = None,
    correction: Correction | None = None,
    before: bool = False,
    resets: Tensor | None = None,
    state: Tensor | None = None,
    micro: int = 1,
) -> Result:
    rows = full_gate(gate, k)
    columns = torch.zeros_like(v) if gate_columns is None else gate_columns
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    outs = []
    for t in range(q.shape[2]):
        if resets is not None:
            state = torch.where(resets[:, t, None, None, None], torch.zeros_like(state), state)
        read = state
        for n in range(t * micro, (t + 1) * micro):
            term = (correction[0][:, :, n], correction[1][:, :, n], correction[2]) if correction else None
            state = step(state, k[:, :, n], v[:, :, n], rows[:, :, n], columns[:, :, n], term)
        outs.append((q[:, :, t, :, None] * (read if before else state)).sum(-2))
    return (torch.stack(outs, 2) if outs else q.new_zeros(*q.shape[:3], v.shape[-1])), state
