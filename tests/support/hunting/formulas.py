"""Random scores, weights and values, which have gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hunting.relations import condition, integer
from hunting.scene import Draft, Scene, Term, Value


@dataclass(frozen=True)
class Weights:
    """A `weights` line, or None; `value` returns weights (B, H, Nq, Nk) and the LSE (B, H, Nq), if there is one."""

    line: str | None
    value: Value
    extra: Value | None = None
    softmax: bool = True


def products(s: Scene) -> Tensor:
    """Compute the inner products of all queries and keys (B, H, Nq, Nk)."""
    return s.q @ s.k.transpose(-1, -2)


def scaled(s: Scene) -> Tensor:
    """Compute the default score."""
    return products(s) * s.factor


def score(draft: Draft) -> Term | None:
    """Draw a score, or None for the default score."""
    if draft.chance(0.3):
        return None
    base: Term = Term("scale * dot(q, k)", scaled)
    kind = draft.pick("plain", "capped", "cosine", "plain", "relu")
    if kind == "capped":
        cap = draft.number(1, 5)
        base = Term(f"{cap} * tanh(scale * dot(q, k) / {cap})", lambda s: cap * torch.tanh(scaled(s) / cap))
    elif kind == "cosine":
        base = Term("3 * dot(normalised(q), normalised(k))", _cosine)
    elif kind == "relu":
        base = Term("scale * dot(relu(q), sigmoid(k))", _relu)
    for _ in range(draft.number(0, 2)):
        base = _more(base, _bias(draft))
    return base


def _more(a: Term, b: Term) -> Term:
    return Term(f"{a.text} + {b.text}", lambda s: a.value(s) + b.value(s))


def _cosine(s: Scene) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        length = (x * x).sum(-1, keepdim=True)
        return torch.where(length > 0, x / torch.where(length > 0, length, 1).sqrt(), 0)

    return 3 * unit(s.q) @ unit(s.k).transpose(-1, -2)


def _relu(s: Scene) -> Tensor:
    return torch.relu(s.q) @ torch.sigmoid(s.k).transpose(-1, -2) * s.factor


def _bias(draft: Draft) -> Term:
    kinds = ["slope", "table", "choice", "power", "vector table"]
    if draft.indexed:
        kinds += ["by key", "by query", "gates", "gates"]
    kind = draft.pick(*kinds)
    if kind == "slope":
        name = draft.input("real", ("head",), "normal", learned=draft.chance(0.5))
        return Term(f"{name} * (k - q) / 8", lambda s: s.inputs[name].view(1, -1, 1, 1) * s.real(s.k_at - s.q_at) / 8)
    if kind == "choice":
        c = condition(draft, 0)
        return Term(f"(0.5 if {c.text} else -0.25)", lambda s: s.real(torch.where(c.value(s), 0.5, -0.25)))
    if kind == "power":
        return Term("0.75 ** abs(q - k)", lambda s: 0.75 ** s.real((s.q_at - s.k_at).abs()))
    if kind == "by key":
        name = draft.input("real", ("batch", "key"), "normal")
        return Term(f"{name}[k]", lambda s: s.inputs[name][:, None, None, :])
    if kind == "by query":
        name = draft.input("real", ("batch", "head", "query"), "normal")
        return Term(f"tanh({name}[q]) * (q - k) / 16", lambda s: _by_query(s, name))
    if kind == "gates":
        return _gates(draft)
    n = draft.number(2, 6)
    x = integer(draft, 1)
    if kind == "table":
        name = draft.input("real", ("head", n), "normal", learned=draft.chance(0.5))
        return Term(f"{name}[{x.text} % {n}]", lambda s: s.inputs[name][s.head, x.value(s) % n])
    name = draft.input("real", (n, "dk"), "normal", learned=True)
    return Term(
        f"scale * dot(q, {name}[{x.text} % {n}])",
        lambda s: (s.q[:, :, :, None] * s.inputs[name][x.value(s) % n]).sum(-1) * s.factor,
    )


def _by_query(s: Scene, name: str) -> Tensor:
    return torch.tanh(s.inputs[name])[:, :, :, None] * s.real(s.q_at - s.k_at) / 16


def _gates(draft: Draft) -> Term:
    name, i = draft.input("log_decay", ("batch", "token", "head"), draft.pick("gate", "strong gate")), draft.variable()

    def value(s: Scene) -> Tensor:
        gates = s.inputs[name].transpose(1, 2)  # (B, H, tokens)
        j = torch.arange(gates.shape[-1]).view(1, 1, 1, 1, -1)
        between = (j > s.k_at[..., None]) & (j <= s.q_at[..., None])
        return torch.where(between, gates[:, :, None, None], 0).sum(-1)

    return Term(f"sum({name}[{i}] for {i} in k + 1 .. q + 1)", value)


def weights(draft: Draft) -> Weights:
    """Draw a `weights` line."""
    kind = draft.pick(*["softmax"] * 5, "sink", "sigmoid", "shares", "gated", "mixed")
    if kind == "softmax":
        return Weights(None, lambda s: torch.empty(0))
    if kind == "sink":
        name = draft.input("real", ("head",), "normal", learned=True)
        return Weights(
            f"softmax(score, extra = {name})",
            lambda s: torch.empty(0),
            extra=lambda s: s.inputs[name].view(1, -1, 1),
        )
    if kind == "gated" and draft.indexed:
        name = draft.input("unit", ("batch", "head", "query"), "unit")
        return Weights(f"{name}[q] * softmax(score)", lambda s: s.inputs[name][..., None], softmax=False)
    if kind == "mixed" and draft.indexed:
        name = draft.input("unit", ("batch", "head", "query"), "unit")
        return Weights(
            f"{name}[q] * softmax(score) + (1 - {name}[q]) / count(visible for k)",
            lambda s: s.inputs[name][..., None],
            softmax=False,
        )
    if kind == "shares":
        return Weights("softplus(score) / sum(softplus(score) for k)", lambda s: torch.empty(0), softmax=False)
    return Weights("sigmoid(score)", lambda s: torch.empty(0), softmax=False)


def value(draft: Draft) -> Term | None:
    """Draw a value (B, H, Nq or 1, Nk, dv), or None for the key's v."""
    if draft.chance(0.75):
        return None
    if draft.indexed and draft.chance(0.4):
        name = draft.input("real", ("batch", "key"), "normal")
        return Term(f"{name}[k] * v", lambda s: s.inputs[name][:, None, None, :, None] * s.v[:, :, None])
    n = draft.number(2, 5)
    name = draft.input("real", ("head", n, "dv"), "normal", learned=True)
    x = integer(draft, 1)
    return Term(
        f"v[k] + {name}[{x.text} % {n}]",
        lambda s: s.v[:, :, None] + s.inputs[name][s.head, x.value(s) % n],
    )
