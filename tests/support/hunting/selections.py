"""Random selections by content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hunting.scene import Draft, Scene


@dataclass(frozen=True)
class Chosen:
    """The lines of a `select chosen`, and the keys that each query selected (B, H, Nq, Nk)."""

    lines: list[str]
    mask: Callable[[Scene], Tensor]
    ties: int | None


def selection(draft: Draft) -> Chosen:
    """Draw the top blocks by their mean key, or top keys, with or without ties."""
    if draft.chance(0.3):
        return _of_tokens(draft)
    block, keep = draft.number(2, 5), draft.number(0, 3)
    ties = draft.chance(0.5)
    candidates = draft.pick("b.end <= q", "b.start <= q", "")
    with_own, by = draft.chance(0.5), draft.pick("mean", "max")
    ties = ties and (
        by == "max" or block in (2, 4)
    )  # a mean of three integers is rounded, and then no score ties exactly
    shared = draft.chance(0.2)
    score = f"dot(q, {by}(b.k))"
    lines = ["select chosen", f"    over b = k // {block}"]
    lines.append(f"    score {f'sum(dot(q[q], {by}(b.k)) for head in group)' if shared else score}")
    if candidates:
        lines.append(f"    from {candidates}")
    lines.append(f"    keep rank < {keep}")
    if with_own:
        lines.append("    always q in b")

    def mask(s: Scene) -> Tensor:
        return _by_blocks(s, block, keep, candidates, with_own, by, shared)

    return Chosen(lines, mask, block if ties else None)


def _of_tokens(draft: Draft) -> Chosen:
    """Select the best keys of each query, the keys above a threshold, or both."""
    keep, causal, with_own = draft.number(1, 4), draft.chance(0.5), draft.chance(0.3)
    kind = draft.pick("rank", "score", "either")
    kept = {"rank": f"rank < {keep}", "score": "score > 0.5", "either": f"rank < {keep} or score > 0.5"}[kind]
    lines = ["select chosen", "    score dot(q, k)", *(["    from k <= q"] if causal else []), f"    keep {kept}"]
    lines += ["    always k == q"] if with_own else []

    def mask(s: Scene) -> Tensor:
        scores = (s.q @ s.k.transpose(-1, -2)).detach()
        allowed = (s.k_at <= s.q_at).expand(s.shape) if causal else torch.ones(s.shape, dtype=torch.bool)
        ranked = torch.where(allowed, scores, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(ranked).scatter_(-1, ranked, torch.arange(s.keys).expand(s.shape).contiguous())
        best, above = rank < keep, scores > 0.5
        chosen = allowed & {"rank": best, "score": above, "either": best | above}[kind]
        return chosen | (s.k_at == s.q_at) if with_own else chosen

    return Chosen(lines, mask, 1 if draft.chance(0.5) else None)


def _by_blocks(s: Scene, block: int, keep: int, candidates: str, with_own: bool, by: str, shared: bool) -> Tensor:
    keys = s.keys
    blocks = range(0, keys, block)
    mask = torch.zeros(s.shape, dtype=torch.bool)
    if not keys:
        return mask
    of_blocks = [s.k[:, :, i : i + block] for i in blocks]
    means = torch.stack([x.mean(2) if by == "mean" else x.amax(2) for x in of_blocks], 2)
    scores = (s.q @ means.transpose(-1, -2)).detach()
    if shared:
        group = s.heads // s.kv_heads
        sums = [scores[:, i : i + group].sum(1, keepdim=True) for i in range(0, s.heads, group)]
        scores = torch.cat(sums, 1).repeat_interleave(group, 1)
    query = s.q_at.view(-1)
    for row in range(s.shape[2]):
        allowed = [
            n
            for n, i in enumerate(blocks)
            if not candidates or (min(i + block, keys) if "end" in candidates else i) <= int(query[row])
        ]
        for entry in range(s.shape[0]):
            for head in range(s.shape[1]):
                best = sorted(allowed, key=lambda n: (-float(scores[entry, head, row, n]), n))[:keep]
                for n in best:
                    mask[entry, head, row, n * block : (n + 1) * block] = True
        if with_own and 0 <= int(query[row]) < keys:
            n = int(query[row]) // block
            mask[:, :, row, n * block : (n + 1) * block] = True
    return mask
