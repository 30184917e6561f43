"""Sparsifiner, written from its authors' program."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from reference.routing import Result, best, softmax_over


def sparsifiner(q: Tensor, k: Tensor, v: Tensor, *, coef: Tensor, basis: Tensor, rho: float) -> Result:
    """Wei et al. 2023: the best ⌈rho Nk⌉ of each row of coef (B, Hq, Nq, r) times basis (Nk, r); row 0 sees all."""
    score = torch.einsum("bhqr,kr->bhqk", coef, basis).detach()
    chosen = best(score, torch.ones_like(score, dtype=torch.bool), math.ceil(Fraction(str(rho)) * k.shape[2]))
    chosen[:, :, 0] = True
    return softmax_over(q, k, v, chosen)
