"""Relations in calls whose first queries are before key 0, with independent definitions in Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Seen = Callable[[Tensor, Tensor], Tensor]

RELATIONS: Mapping[str, Seen] = {
    "k <= q": lambda q, k: k <= q,
    "0 <= q - k < 5 or k <= q and k < 2": lambda q, k: (k <= q) & ((q - k < 5) | (k < 2)),
    "k // 4 <= q // 4": lambda q, k: (k / 4).floor() <= (q / 4).floor(),
    "q // 4 == k // 4": lambda q, k: (k / 4).floor() == (q / 4).floor(),
    "abs(q - k) < 6": lambda q, k: (q - k).abs() < 6,
    "q % 3 == k % 3": lambda q, k: (q - k) - ((q - k) / 3).floor() * 3 == 0,
    "k < 3 or k <= q": lambda q, k: (k < 3) | (k <= q),
    "k == q + 9": lambda q, k: k == q + 9,
}


def spec(relation: str) -> str:
    """Return a relation's text."""
    return f"pattern beyond\n    align end\n    visible {relation}\n"


def mask(relation: str, n_q: int, n_k: int) -> Tensor:
    """Return the mask (queries, keys); the last query is at the last key."""
    return RELATIONS[relation](torch.arange(n_q)[:, None] + n_k - n_q, torch.arange(n_k))


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (out, lse); rows without visible keys have 0, -inf and no gradients."""
    seeing = seen.any(-1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~seen & seeing[:, None], -math.inf)
    out = (scores.softmax(-1) @ v).masked_fill(~seeing[:, None], 0)
    return out, scores.logsumexp(-1).masked_fill(~seeing, -math.inf)


def results(run: Callable[..., tuple[Tensor, Tensor]], operands: list[Tensor]) -> list[Tensor]:
    """Return out, lse and the gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in operands]
    out, lse = run(*leaves)
    total = out.square().sum() + lse[lse > -math.inf].sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]
