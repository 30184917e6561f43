"""Incoming gradients that are NaN reach no token behind a border of a recurrence, on any executor.

Borders are documents, resets and decays of 0, at the first token, inside of chunks, at their edges and at the last one.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from attnc import compile_attention

Backend = Literal["auto", "reference"]
TOKENS = 21

STEPS = {
    "scalar": ("g: log_decay[batch, token, head]", ("S = exp(g) * S + outer(k, v)",), "q @ S"),
    "rows": ("g: log_decay[batch, token, head, dk]", ("S = exp(g) * S + outer(k, v)",), "q @ S"),
    "corrected": (
        "g: log_decay[batch, token, head]",
        ("S = exp(g) * S", "S = S + 0.5 * outer(k, v - k @ S)"),
        "q @ S",
    ),
    "stepping": (  # token by token: a state is divided by what another one tells
        "g: log_decay[batch, token, head]",
        ("S = exp(g) * S", "S = S + outer(k, v) / (1 + abs(q @ S @ v))"),
        "q @ S",
    ),
    "entries": ("g: unit[batch, token, head, dv]", ("h = g * h + (1 - g) * v",), "h"),
}
EVERY: list[tuple[Backend, str]] = [
    *(("auto", kind) for kind in STEPS),
    *(("reference", kind) for kind in ("scalar", "corrected", "entries")),
]


def text(kind: str, border: str) -> str:
    gate, steps, read = STEPS[kind]
    lines = ["recurrence hiding", f"    input {gate}"]
    lines += ["    input fresh: bool[batch, token]"] if border == "reset" else []
    lines += ["    state h: [dv]" if kind == "entries" else "    state S: [dk, dv]"]
    lines += ["    reset fresh"] if border == "reset" else []
    return "\n".join([*lines, *(f"    step {step}" for step in steps), f"    read {read}"]) + "\n"


def given(kind: str, border: str, at: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """q, k, v and the gate; what else a call takes."""
    torch.manual_seed(0)
    found = {name: torch.randn(1, 2, TOKENS, 16) for name in "qkv"}
    found["k"] /= found["k"].norm(dim=-1, keepdim=True)
    wide = [16] if kind in ("rows", "entries") else []
    gates = -torch.rand(1, TOKENS, 2, *wide) * 0.1
    found["g"] = gates.exp() if kind == "entries" else gates
    if border == "gate":
        found["g"][:, at] = 0 if kind == "entries" else -math.inf
        return found, {}
    if border == "reset":
        return found, {"fresh": (torch.arange(TOKENS) == at)[None]}
    return found, {"cu_seqlens": torch.tensor(sorted({0, at, TOKENS}))}


def gradients(
    backend: Backend, kind: str, border: str, tensors: dict[str, Tensor], more: dict[str, Any], weights: Tensor
) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    attend: Any = compile_attention(text(kind, border), backend=backend)
    out = attend(**leaves, **more)
    found = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def part(name: str, x: Tensor, tokens: slice) -> Tensor:
    return x[:, tokens] if name == "g" else x[:, :, tokens]


@pytest.mark.parametrize("border", ["cu_seqlens", "reset", "gate"])
@pytest.mark.parametrize(("backend", "kind"), EVERY)
def test_a_gradient_that_is_nan_crosses_no_border(backend: Backend, kind: str, border: str) -> None:
    """NaN reached tokens on both sides by chunks, and those before it by kernels and through decays of 0."""
    for at in (1, 16, TOKENS - 1):
        tensors, more = given(kind, border, at)
        weights = torch.randn(1, 2, TOKENS, 16)
        for bad in {at, TOKENS - 1, at - 1}:
            spoiled, calm = weights.clone(), weights.clone()
            spoiled[:, :, bad, 3], calm[:, :, bad] = math.nan, 0
            wanted = gradients(backend, kind, border, tensors, more, calm)
            found = gradients(backend, kind, border, tensors, more, spoiled)
            other = slice(0, at) if bad >= at else slice(at, TOKENS)
            for name, x in found.items():
                if name == "g" and border == "gate" and bad >= at:
                    continue  # the gate of the border itself, and by 0 those before
                assert torch.allclose(part(name, x, other), part(name, wanted[name], other), atol=1e-5), (name, at, bad)
            assert not part("q", found["q"], slice(bad, bad + 1)).isfinite().all() or kind == "entries"
            assert not part("v", found["v"], slice(bad, bad + 1)).isfinite().all()
