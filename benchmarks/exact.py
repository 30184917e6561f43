"""Masked attention computed from its definition, a block of rows at a time: the truth for results of benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

MaskMod = Callable[..., Tensor]

ROWS = 512
"""Number of queries computed at once."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Allowed errors, relative to the largest true entry."""


def results(mask_mod: MaskMod, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, head: int) -> dict[str, Tensor]:
    """Return `out`, and with `grad` also `dq`, `dk` and `dv`, of one head in fp64.

    q, k, v and grad are those of the head, (n, d); `head` is its index in the mask.
    """
    wide = [x.detach().double().requires_grad_(grad is not None) for x in (q, k, v)]
    outs = []
    for first in range(0, len(q), ROWS):
        rows = slice(first, first + ROWS)
        out = _rows(mask_mod, wide[0][rows], wide[1], wide[2], first, head)
        if grad is not None:
            out.backward(grad[rows].double())  # type: ignore[no-untyped-call]  # torch has no type for it
        outs.append(out.detach())
    true = {"out": torch.cat(outs)}
    return true | {f"d{name}": x.grad for name, x in zip("qkv", wide, strict=True) if x.grad is not None}


def _rows(mask_mod: MaskMod, q: Tensor, k: Tensor, v: Tensor, first: int, head: int) -> Tensor:
    queries = torch.arange(first, first + len(q), device=q.device)[:, None]
    zero = torch.zeros((), dtype=torch.long, device=q.device)
    seen = mask_mod(zero, zero + head, queries, torch.arange(len(k), device=q.device)[None])
    scores = (q @ k.T) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def errors(ours: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest error by name, relative to the largest true entry; infinite for NaN."""
    largest = {}
    for name, exact in true.items():
        gap = ((ours[name].double() - exact).abs().max() / exact.abs().max()).item()
        largest[name] = math.inf if math.isnan(gap) else gap
    return largest
