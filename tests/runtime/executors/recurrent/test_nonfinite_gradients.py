"""NaN in incoming gradients crosses no border of a recurrence, on any executor.

Borders are documents, resets and decays of 0, at the first token, inside chunks, at chunk edges and at the last
token.
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
    "stepping": (  # token by token: a state is divided by a read of another state
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


def call_of(kind: str, border: str, border_token: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Draw q, k, v and the gate as one dict, the remaining arguments of a call as a second dict."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(1, 2, TOKENS, 16) for name in "qkv"}
    tensors["k"] /= tensors["k"].norm(dim=-1, keepdim=True)
    wide = [16] if kind in ("rows", "entries") else []
    gates = -torch.rand(1, TOKENS, 2, *wide) * 0.1
    tensors["g"] = gates.exp() if kind == "entries" else gates
    if border == "gate":
        tensors["g"][:, border_token] = 0 if kind == "entries" else -math.inf
        return tensors, {}
    if border == "reset":
        return tensors, {"fresh": (torch.arange(TOKENS) == border_token)[None]}
    return tensors, {"cu_seqlens": torch.tensor(sorted({0, border_token, TOKENS}))}


def gradients(
    backend: Backend, kind: str, border: str, tensors: dict[str, Tensor], more: dict[str, Any], weights: Tensor
) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    attend: Any = compile_attention(text(kind, border), backend=backend)
    out = attend(**leaves, **more)
    grads = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def tokens_of(name: str, x: Tensor, tokens: slice) -> Tensor:
    return x[:, tokens] if name == "g" else x[:, :, tokens]


@pytest.mark.parametrize("border", ["cu_seqlens", "reset", "gate"])
@pytest.mark.parametrize(("backend", "kind"), EVERY)
def test_nan_gradients_cross_no_border(backend: Backend, kind: str, border: str) -> None:
    """NaN reached tokens on both sides in chunks, and tokens before the border in kernels and through decays of 0."""
    for border_token in (1, 16, TOKENS - 1):
        tensors, more = call_of(kind, border, border_token)
        weights = torch.randn(1, 2, TOKENS, 16)
        for bad in {border_token, TOKENS - 1, border_token - 1}:
            spoiled, calm = weights.clone(), weights.clone()
            spoiled[:, :, bad, 3], calm[:, :, bad] = math.nan, 0
            wanted = gradients(backend, kind, border, tensors, more, calm)
            grads = gradients(backend, kind, border, tensors, more, spoiled)
            unaffected = slice(0, border_token) if bad >= border_token else slice(border_token, TOKENS)
            for name, x in grads.items():
                if name == "g" and border == "gate" and bad >= border_token:
                    continue  # the gate at the border itself, and gates before it through the factor 0
                assert torch.allclose(
                    tokens_of(name, x, unaffected), tokens_of(name, wanted[name], unaffected), atol=1e-5
                ), (
                    name,
                    border_token,
                    bad,
                )
            assert not tokens_of("q", grads["q"], slice(bad, bad + 1)).isfinite().all() or kind == "entries"
            assert not tokens_of("v", grads["v"], slice(bad, bad + 1)).isfinite().all()
