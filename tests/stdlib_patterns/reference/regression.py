"""Test-time regression, written from its definition: a ridge regression is solved from scratch for every token."""

from __future__ import annotations

import torch
from torch import Tensor

States = tuple[Tensor, Tensor, Tensor]


def regression_at_test_time(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    ridge: float = 1,
    gamma: float = 1,
    scale: float = 1,
    state: States | None = None,
) -> tuple[Tensor, States]:
    """Wang et al. 2025: minimise Σ_s gamma^(t-s) beta_s |v_s - M k_s|² + gamma^t ridge |M|² over M.

    q, k (B, H, N, dk), v (B, H, N, dv), beta (B, N, H) → out (B, H, N, dv), M_t q_t; t = 1 is the first token. States
    are the inverse of the last solved matrix (B, H, dk, dk), 1 (B, H), and the last M (B, H, dk, dv); a `state`
    continues from them: it counts as gamma^t |M - M_0|² by that matrix. Unscaled.
    """
    weights, rows, eye = beta.transpose(1, 2), [], torch.eye(k.shape[3], dtype=q.dtype)
    if state is None:
        empty = q.new_zeros(*q.shape[:2], k.shape[3], k.shape[3] + v.shape[3])
        state = (empty[..., : k.shape[3]], q.new_zeros(q.shape[:2]), empty[..., k.shape[3] :])
    inverse, begun, slope = state
    first = torch.linalg.inv(inverse + (1 - begun[..., None, None]) / ridge * eye)
    current = first @ slope
    for t in range(1, q.shape[2] + 1):
        ages = torch.arange(t - 1, -1, -1, dtype=q.dtype)
        w = (gamma**ages * weights[:, :, :t])[..., None]
        keys, values = k[:, :, :t], v[:, :, :t]
        covariance = keys.transpose(2, 3) @ (w * keys) + gamma**t * first
        inverse = torch.linalg.inv(covariance)
        slope = torch.linalg.solve(covariance, keys.transpose(2, 3) @ (w * values) + gamma**t * current)
        rows.append(q[:, :, t - 1 : t] @ slope)
    out = torch.cat(rows, 2) if rows else q.new_zeros(*q.shape[:3], v.shape[3])
    return out, (inverse, torch.ones_like(begun) if rows else begun, slope)
