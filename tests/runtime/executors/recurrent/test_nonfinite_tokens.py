"""Tokens before a border (a document, a reset, a decay of 0) reach no token after the border."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from attnc.runtime.fallbacks import fallbacks, reset_fallbacks

Backend = Literal["auto", "reference"]
TOKENS, BORDER = 40, 21
BORDERS = ("cu_seqlens", "reset", "gate")

STEPS = {
    "scalar": ("g: log_decay[batch, token, head]", "S: [dk, dv]", ("S = exp(g) * S + outer(k, v)",), "q @ S"),
    "rows": ("g: log_decay[batch, token, head, dk]", "S: [dk, dv]", ("S = exp(g) * S + outer(k, v)",), "q @ S"),
    "corrected": (
        "g: log_decay[batch, token, head]",
        "S: [dk, dv]",
        ("S = exp(g) * S", "S = S + 0.5 * outer(k, v - k @ S)"),
        "q @ S",
    ),
    "entries": ("g: unit[batch, token, head, dv]", "h: [dv]", ("h = g * h + (1 - g) * v",), "h"),
}


def text(kind: str, border: str) -> str:
    gate, state, steps, read = STEPS[kind]
    lines = ["recurrence hiding", f"    input {gate}"]
    lines += ["    input fresh: bool[batch, token]"] if border == "reset" else []
    lines += [f"    state {state}"] + (["    reset fresh"] if border == "reset" else [])
    return "\n".join([*lines, *(f"    step {step}" for step in steps), f"    read {read}"]) + "\n"


def draw_tensors(kind: str, border: str, poison: str) -> dict[str, Tensor]:
    """Draw q, k, v and the gate, with non-finite numbers only in tokens before the border."""
    torch.manual_seed(0)
    drawn = {name: torch.randn(1, 2, TOKENS, 8) for name in "qkv"}
    drawn["k"] /= drawn["k"].norm(dim=-1, keepdim=True)
    gates = -torch.rand(1, TOKENS, 2, *([8] if kind in ("rows", "entries") else [])) * 0.1
    drawn["g"] = gates.exp() if kind == "entries" else gates
    if border == "gate":
        drawn["g"][:, BORDER] = 0 if kind == "entries" else -math.inf
    if poison == "NaN":
        drawn["v"][:, :, 9], drawn["k"][:, :, 12] = math.nan, math.nan
    elif poison == "overflow":
        drawn["v"][:, :, 5:15] = 3e38
    return drawn


def output_and_grads(
    backend: Backend, kind: str, border: str, all_tensors: dict[str, Tensor], start: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the output after the border and the gradients there, of a call that begins at `start`."""
    leaves = {
        name: (x[:, start:] if name == "g" else x[:, :, start:]).clone().requires_grad_()
        for name, x in all_tensors.items()
    }
    more: dict[str, Any] = {}
    if border == "reset":
        more["fresh"] = (torch.arange(start, TOKENS) == BORDER)[None]
    cut = torch.tensor([0, BORDER, TOKENS]) if border == "cu_seqlens" and not start else None
    source = text(kind, border)
    attend = compile_attention(source, backend=backend)
    out = attend(leaves["q"], leaves["k"], leaves["v"], g=leaves["g"], cu_seqlens=cut, **more)[:, :, BORDER - start :]
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    behind = [
        x[:, BORDER - start :] if name == "g" else x[:, :, BORDER - start :]
        for name, x in zip(leaves, grads, strict=True)
    ]
    return out.detach(), behind


@pytest.mark.parametrize("poison", ["NaN", "overflow"])
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("backend", ["auto", "reference"], ids=["chunks", "tokens"])
def test_nothing_crosses_a_border(backend: Backend, kind: str, border: str, poison: str) -> None:
    """Chunks failed at every border, as 0 * NaN is NaN, and the token loop at a decay of 0."""
    vectors = draw_tensors(kind, border, poison)
    out, grads = output_and_grads(backend, kind, border, vectors, 0)
    alone, of_alone = output_and_grads("reference", kind, border, vectors, BORDER)
    assert torch.allclose(out, alone, atol=1e-5)
    for x, y in zip(grads, of_alone, strict=True):
        assert torch.allclose(x, y, atol=1e-5)


def test_nan_before_the_border_shows_and_is_counted() -> None:
    vectors = draw_tensors("scalar", "cu_seqlens", "NaN")
    attend = compile_attention(text("scalar", "cu_seqlens"))
    cut = torch.tensor([0, BORDER, TOKENS])
    reset_fallbacks()
    out = attend(vectors["q"], vectors["k"], vectors["v"], g=vectors["g"], cu_seqlens=cut)
    assert out[:, :, 12:BORDER].isnan().all()
    assert [fallback.kind for fallback in fallbacks()] == ["token by token"]
    reset_fallbacks()
    attend(vectors["q"][:, :, :9], vectors["k"][:, :, :9], vectors["v"][:, :, :9], g=vectors["g"][:, :9])
    assert not fallbacks()


def test_a_reset_clears_the_state_passed_to_a_call() -> None:
    """A decode step whose token resets the state."""
    vectors = draw_tensors("scalar", "reset", "")
    attend = compile_attention(text("scalar", "reset"))
    q, k, v, g = vectors["q"][:, :, :1], vectors["k"][:, :, :1], vectors["v"][:, :, :1], vectors["g"][:, :1]
    state = {"S": torch.full((1, 2, 8, 8), math.nan)}
    out, after = attend(q, k, v, g=g, fresh=torch.ones(1, 1, dtype=torch.bool), state=state, return_state=True)
    assert torch.allclose(out, (q * k).sum(-1, keepdim=True) * v, atol=1e-6)
    assert after["S"].isfinite().all()
