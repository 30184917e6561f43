"""Tokens before a border (a document, a reset, a decay of 0) reach no token behind the border."""

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


def tensors(kind: str, border: str, poison: str) -> dict[str, Tensor]:
    """q, k, v and the gate; nothing but the tokens before the border is spoiled."""
    torch.manual_seed(0)
    found = {name: torch.randn(1, 2, TOKENS, 8) for name in "qkv"}
    found["k"] /= found["k"].norm(dim=-1, keepdim=True)
    gates = -torch.rand(1, TOKENS, 2, *([8] if kind in ("rows", "entries") else [])) * 0.1
    found["g"] = gates.exp() if kind == "entries" else gates
    if border == "gate":
        found["g"][:, BORDER] = 0 if kind == "entries" else -math.inf
    if poison == "NaN":
        found["v"][:, :, 9], found["k"][:, :, 12] = math.nan, math.nan
    elif poison == "overflow":
        found["v"][:, :, 5:15] = 3e38
    return found


def called(
    backend: Backend, kind: str, border: str, given: dict[str, Tensor], start: int
) -> tuple[Tensor, list[Tensor]]:
    """The output behind the border, and the gradients there, of a call that begins at `start`."""
    leaves = {
        name: (x[:, start:] if name == "g" else x[:, :, start:]).clone().requires_grad_() for name, x in given.items()
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
    """It failed by chunks at every border, as 0 * NaN is NaN, and token by token at a decay of 0."""
    given = tensors(kind, border, poison)
    out, grads = called(backend, kind, border, given, 0)
    alone, of_alone = called("reference", kind, border, given, BORDER)
    assert torch.allclose(out, alone, atol=1e-5)
    for x, y in zip(grads, of_alone, strict=True):
        assert torch.allclose(x, y, atol=1e-5)


def test_before_the_border_it_shows_and_is_counted() -> None:
    given = tensors("scalar", "cu_seqlens", "NaN")
    attend = compile_attention(text("scalar", "cu_seqlens"))
    cut = torch.tensor([0, BORDER, TOKENS])
    reset_fallbacks()
    out = attend(given["q"], given["k"], given["v"], g=given["g"], cu_seqlens=cut)
    assert out[:, :, 12:BORDER].isnan().all()
    assert [one.kind for one in fallbacks()] == ["token by token"]
    reset_fallbacks()
    attend(given["q"][:, :, :9], given["k"][:, :, :9], given["v"][:, :, :9], g=given["g"][:, :9])
    assert not fallbacks()


def test_a_state_given_to_a_call_is_emptied_too() -> None:
    """A step of decoding whose token begins anew."""
    given = tensors("scalar", "reset", "")
    attend = compile_attention(text("scalar", "reset"))
    q, k, v, g = given["q"][:, :, :1], given["k"][:, :, :1], given["v"][:, :, :1], given["g"][:, :1]
    state = {"S": torch.full((1, 2, 8, 8), math.nan)}
    out, after = attend(q, k, v, g=g, fresh=torch.ones(1, 1, dtype=torch.bool), state=state, return_state=True)
    assert torch.allclose(out, (q * k).sum(-1, keepdim=True) * v, atol=1e-6)
    assert after["S"].isfinite().all()
