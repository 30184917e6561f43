"""Random attentions: relation, score, weights, value, documents, branches and selections."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hunting import formulas
from hunting.relations import AXES, condition
from hunting.scene import Draft, Input, Scene, Term
from hunting.selections import selection

Dense = Callable[[Scene], tuple[Tensor, Tensor | None, Tensor]]
"""A closure that returns (out (B, H, Nq, dv), lse (B, H, Nq) or None, visible (B, H, Nq, Nk))."""


@dataclass(frozen=True)
class Drawn:
    """A text, the closure that defines its meaning, and how it may be called."""

    text: str
    dense: Dense
    inputs: tuple[Input, ...]
    align: str | None
    grid: tuple[int, ...] | None = None
    documents: str | None = None
    recurrent: bool = False
    ties: int | None = None
    """If set, vectors are small integers and lengths are multiples of this block, so that scores tie exactly."""


def attention(rng: random.Random) -> Drawn:
    """Draw a random attention."""
    draft = Draft(rng, align=rng.choice([None, "end", "end", "start"]))
    if draft.chance(0.15):
        draft.grid = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3)))
    documents = None
    if draft.grid is None and draft.chance(0.15):
        documents = draft.input("int", ("batch", "token"), "runs")
        draft.indexed = False
    head = ["pattern drawn"]
    if draft.align:
        head.append(f"align {draft.align}")
    if draft.grid:
        axes = zip(AXES[-len(draft.grid) :], draft.grid, strict=True)
        head.append("tokens " + ", ".join(f"{axis}: {extent}" for axis, extent in axes))
    if documents:
        head.append(f"documents {documents}")
    plain = draft.grid is None and documents is None
    if plain and draft.chance(0.15):
        return _selecting(draft, head)
    body, dense = _branches(draft) if draft.chance(0.15) else _single(draft)
    return Drawn(_text(draft, head, body), dense, tuple(draft.inputs), draft.align, draft.grid, documents)


def _text(draft: Draft, head: list[str], body: list[str]) -> str:
    lines = [head[0], *(item.declaration for item in draft.inputs), *head[1:], *body]
    return "\n    ".join(lines) + "\n"


def _single(draft: Draft) -> tuple[list[str], Dense]:
    visible = [condition(draft, 3) for _ in range(draft.number(1, 2))]
    score, weights, value = formulas.score(draft), formulas.weights(draft), formulas.value(draft)
    body = [f"visible {term.text}" for term in visible]
    if score is not None:
        body.append(f"score {score.text}")
    if weights.line is not None:
        body.append(f"weights {weights.line}")
    if value is not None:
        body.append(f"value {value.text}")

    def dense(s: Scene) -> tuple[Tensor, Tensor | None, Tensor]:
        mask = s.pairs
        for term in visible:
            mask = mask & term.value(s)
        return attend(s, mask, score, weights, value)

    return body, dense


def attend(
    s: Scene, mask: Tensor, score: Term | None, weights: formulas.Weights, value: Term | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute the dense attention over the pairs of `mask`."""
    scores = (formulas.scaled(s) if score is None else score.value(s)).expand(s.shape)
    lse = None
    if weights.line is None or "softmax" in weights.line:
        shares, lse = softmax(scores, mask, None if weights.extra is None else weights.extra(s))
        if not weights.softmax:
            weight, lse = weights.value(s), None
            even = (
                mask.to(weight.dtype) / mask.sum(-1, keepdim=True).clamp(min=1)
                if "count" in (weights.line or "")
                else 0.0
            )
            shares = shares * weight + (1 - weight) * even
    elif "softplus" in weights.line:
        shares = softplus_shares(scores, mask)
    else:
        shares = torch.where(mask, torch.sigmoid(torch.where(mask, scores, 0)), 0)
    if value is None:
        return shares @ s.v, lse, mask
    return (shares[..., None] * value.value(s)).sum(3), lse, mask


def softplus_shares(scores: Tensor, mask: Tensor) -> Tensor:
    """Compute softplus(score) divided by its sum over `mask`, by logarithms: 1 / total overflows for a subnormal.

    The logarithm of a subnormal softplus is its score. A softplus of 0 has weight 0, even in a row of zeros.
    """
    softplus = torch.nn.functional.softplus
    seen = mask & (softplus(scores) > 0)
    scores = torch.where(seen, scores, 0)
    low = scores < math.log(torch.finfo(scores.dtype).tiny)
    return softmax(torch.where(low, scores, torch.log(softplus(torch.where(low, 0, scores)))), seen)[0]


def softmax(scores: Tensor, mask: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute weights and LSE over `mask`; a row without any: 0, -inf. If all scores are -inf, `extra` remains."""
    if not scores.shape[-1]:
        return torch.zeros_like(scores), torch.full(scores.shape[:-1], -torch.inf, dtype=scores.dtype)
    hidden = torch.where(mask, scores, -torch.inf)
    top = hidden.detach().amax(-1)
    if extra is not None:
        top = torch.maximum(top, extra.detach().expand_as(top))
    top = torch.where(torch.isfinite(top), top, 0)
    part = torch.where(mask, torch.exp(torch.where(mask, scores, 0) - top[..., None]), 0)
    total = part.sum(-1)
    if extra is not None:
        total = total + torch.exp(extra - top)
    seen = mask.any(-1) & (total > 0)
    safe = torch.where(seen, total, 1)
    lse = torch.where(seen, top + torch.log(safe), -torch.inf)
    return torch.where(seen[..., None], part / safe[..., None], 0), lse


def _branches(draft: Draft) -> tuple[list[str], Dense]:
    shared = condition(draft, 1) if draft.chance(0.3) else None
    visible = [condition(draft, 2) for _ in range(2)]
    scores = [formulas.score(draft) for _ in range(2)]
    body = [] if shared is None else [f"visible {shared.text}"]
    for name, see, score in zip(("near", "far"), visible, scores, strict=True):
        body += [f"branch {name}", f"    visible {see.text}"]
        if score is not None:
            body.append(f"    score {score.text}")
    kind = draft.pick("merge", "gates", "sum") if draft.indexed else draft.pick("merge", "sum")
    gate = draft.input("unit", ("batch", "head", "query"), "unit") if kind == "gates" else ""
    body.append(
        {"merge": "combine merge(near, far)", "sum": "combine near - 0.5 * far"}.get(
            kind, f"combine {gate}[q] * near + (1 - {gate}[q]) * far"
        )
    )

    def dense(s: Scene) -> tuple[Tensor, Tensor | None, Tensor]:
        common = s.pairs
        if shared is not None:
            common = common & shared.value(s)
        masks = [common & see.value(s) for see in visible]
        default = [(formulas.scaled(s) if one is None else one.value(s)).expand(s.shape) for one in scores]
        seen = masks[0] | masks[1]
        if kind == "merge":
            shares, lse = softmax(torch.cat(default, -1), torch.cat(masks, -1))
            return shares @ torch.cat([s.v, s.v], 2), lse, seen
        near, far = (softmax(one, mask)[0] @ s.v for one, mask in zip(default, masks, strict=True))
        if kind == "sum":
            return near - 0.5 * far, None, seen
        share = s.inputs[gate][..., None]
        return share * near + (1 - share) * far, None, seen

    return body, dense


def _selecting(draft: Draft, head: list[str]) -> Drawn:
    chosen = selection(draft)
    causal = draft.chance(0.7)
    also = condition(draft, 1) if draft.chance(0.3) else None
    relation_text = "k in chosen" + (" and k <= q" if causal else "") + (f" or {also.text}" if also else "")

    def dense(s: Scene) -> tuple[Tensor, Tensor | None, Tensor]:
        mask = chosen.mask(s)
        if causal:
            mask = mask & (s.k_at <= s.q_at)
        if also:
            mask = mask | also.value(s)
        return attend(s, mask.expand(s.shape), None, formulas.Weights(None, lambda s: torch.empty(0)), None)

    text = _text(draft, head, [*chosen.lines, f"visible {relation_text}"])
    return Drawn(text, dense, tuple(draft.inputs), draft.align, ties=chosen.ties)
