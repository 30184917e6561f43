"""Test-time regression, written from its definition: a ridge regression is solved anew for every token."""

from __future__ import annotations

import torch
from torch import Tensor


def regression_so_far(
    q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor, ridge: float = 1, gamma: float = 1
) -> tuple[None, Tensor]:
    """Wang et al. 2025: of the weighted squares Σ_s gamma^(t-s) beta_s |v_s - M k_s|² + gamma^t ridge |M|² the least.

    q, k (B, H, N, dk), v (B, H, N, dv), beta (B, N, H) → out (B, H, N, dv), M_t q_t. The first token has t = 1.
    """
    n, weights, rows = q.shape[2], beta.transpose(1, 2), []
    for t in range(1, n + 1):
        ages = torch.arange(t - 1, -1, -1, dtype=q.dtype)
        w = (gamma**ages * weights[:, :, :t])[..., None]
        keys, values = k[:, :, :t], v[:, :, :t]
        covariance = keys.transpose(2, 3) @ (w * keys) + gamma**t * ridge * torch.eye(k.shape[3], dtype=q.dtype)
        slope = torch.linalg.solve(covariance, keys.transpose(2, 3) @ (w * values))
        rows.append(q[:, :, t - 1 : t] @ slope)
    return None, torch.cat(rows, 2)
