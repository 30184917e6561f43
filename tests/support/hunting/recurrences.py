"""Random recurrences, and the loops over tokens that define them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from hunting.attentions import Drawn
from hunting.scene import Draft, Scene


def recurrence(rng: random.Random) -> Drawn:
    """Draw a state with a decay, a write or a correction, perhaps a reset, documents or another order of tokens."""
    draft = Draft(rng)
    lines, documents, fresh = ["state S: [dk, dv]"], None, None
    if draft.chance(0.2):
        documents = draft.input("int", ("batch", "token"), "runs")
        lines.insert(0, f"documents {documents}")
    elif draft.chance(0.25):
        fresh = draft.input("bool", ("batch", "token"), "flag")
        lines.append(f"reset {fresh}")
    backwards = draft.chance(0.15)
    if backwards:
        lines.append("scan -t")
    decay = draft.pick("none", "head", "dk", "dv", "head", "unit", "number")
    gate, factor = _decay(draft, decay)
    correction = draft.chance(0.4)
    rate = draft.input("unit", ("batch", "token", "head"), "unit") if draft.chance(0.6) or correction else None
    first = draft.chance(0.25)
    read = f"read {draft.pick('', 'scale * ')}q @ S"
    steps = [f"step S = {factor} * S"] if factor else []
    write = "outer(k, v - k @ S)" if correction else "outer(k, v)"
    steps.append(f"step S = S + {rate + ' * ' if rate else ''}{write}")
    lines += [read, *steps] if first else [*steps, read]
    text = "\n    ".join(["recurrence drawn", *(item.declaration for item in draft.inputs), *lines]) + "\n"

    def dense(s: Scene) -> tuple[Tensor, Tensor | None, Tensor]:
        return (
            _run(s, gate, decay, correction, rate, first, "scale" in read, fresh, documents, backwards),
            None,
            _all(s),
        )

    return Drawn(text, dense, tuple(draft.inputs), None, documents=documents, recurrent=True)


def _all(s: Scene) -> Tensor:
    return torch.ones(s.shape, dtype=torch.bool)


def _decay(draft: Draft, kind: str) -> tuple[str | None, str]:
    if kind == "none":
        return None, ""
    if kind == "number":
        return None, "0.875"
    if kind == "unit":
        name = draft.input("unit", ("batch", "token", "head"), "unit")
        return name, name
    dims: tuple[str, ...] = ("batch", "token", "head") + (() if kind == "head" else (kind,))
    name = draft.input("log_decay", dims, draft.pick("gate", "gate", "strong gate"))
    return name, f"exp({name})"


def _run(
    s: Scene,
    gate: str | None,
    decay: str,
    correction: bool,
    rate: str | None,
    first: bool,
    scaled: bool,
    fresh: str | None,
    documents: str | None,
    backwards: bool,
) -> Tensor:
    entries, heads, tokens, dk = s.q.shape
    state = s.q.new_zeros(entries, heads, dk, s.v.shape[-1])
    out: list[Tensor] = [s.v[:, :, 0]] * tokens if tokens else []
    order = range(tokens - 1, -1, -1) if backwards else range(tokens)
    before = None
    for t in order:
        empty = _emptied(s, t, before, fresh, documents)
        if empty is not None:
            state = torch.where(empty.view(-1, 1, 1, 1), 0, state)
        before = t
        q, k, v = s.q[:, :, t], s.k[:, :, t], s.v[:, :, t]
        if first:
            out[t] = torch.einsum("bhk,bhkv->bhv", q, state)
        state = _decayed(s, state, t, gate, decay)
        new = v - torch.einsum("bhk,bhkv->bhv", k, state) if correction else v
        if rate:
            new = s.inputs[rate][:, t, :, None] * new
        state = state + k[..., None] * new[..., None, :]
        if not first:
            out[t] = torch.einsum("bhk,bhkv->bhv", q, state)
    stacked = torch.stack(out, 2) if out else s.v[:, :, :0]
    return stacked * s.factor if scaled else stacked


def _emptied(s: Scene, t: int, before: int | None, fresh: str | None, documents: str | None) -> Tensor | None:
    if fresh:
        return s.inputs[fresh][:, t]
    if documents and before is not None:
        ids = s.inputs[documents]
        return ids[:, t] != ids[:, before]
    return None


def _decayed(s: Scene, state: Tensor, t: int, gate: str | None, decay: str) -> Tensor:
    if decay == "none":
        return state
    if gate is None:
        return 0.875 * state
    x = s.inputs[gate][:, t]
    if decay == "unit":
        return x[..., None, None] * state
    factor = torch.exp(x)
    if decay == "head":
        return factor[..., None, None] * state
    return factor[..., :, None] * state if decay == "dk" else factor[..., None, :] * state
