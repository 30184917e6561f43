"""Tokens before a border of a recurrence reach no token behind the border, in kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention


def test_nothing_crosses_a_border_by_kernels() -> None:
    """The result was NaN: a chunk multiplies the tokens of another document by 0."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    gate, cut = -torch.rand(1, 20, 1), torch.tensor([0, 9, 20])
    v[:, :, 4] = math.nan
    attend = compile_attention("mamba2_ssd", backend="triton")
    inputs: dict[str, Any] = {"g": gate, "dt": torch.ones(1, 20, 1), "D": torch.ones(1)}
    out = attend(q, k, v, cu_seqlens=cut, **inputs)[:, :, 9:]
    own: dict[str, Any] = {name: x[:, 9:] if name != "D" else x for name, x in inputs.items()}
    alone = compile_attention("mamba2_ssd", backend="reference")(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:], **own)
    assert torch.allclose(out, alone, atol=1e-5)


TOKENS = 37
"""More than two of the shortest chunks, of 16 tokens."""

STEPS = {
    "scalar": ("g: log_decay[batch, token, head]", ("S = exp(g) * S + outer(k, v)",)),
    "rows": ("g: log_decay[batch, token, head, dk]", ("S = exp(g) * S + outer(k, v)",)),
    "corrected": (
        "g: log_decay[batch, token, head]",
        ("S = exp(g) * S", "S = S + 0.5 * outer(k, v - k @ S)"),
    ),
    "stepping": (  # token by token: a write reads the state
        "g: log_decay[batch, token, head]",
        ("S = exp(g) * S", "S = S + outer(k, v) / (1 + abs(q @ S @ v))"),
    ),
}


def text(kind: str) -> str:
    gate, steps = STEPS[kind]
    lines = ["recurrence hiding", f"    input {gate}", "    state S: [dk, dv]"]
    return "\n".join([*lines, *(f"    step {step}" for step in steps), "    read q @ S"]) + "\n"


def drawn(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {name: torch.randn(1, 1, TOKENS, 16) for name in "qkv"}
    found["k"] /= found["k"].norm(dim=-1, keepdim=True)
    found["g"] = -torch.rand(1, TOKENS, 1, *([16] if kind == "rows" else [])) * 0.1
    return found


def from_token(given: dict[str, Tensor], start: int) -> dict[str, Tensor]:
    return {name: x[:, start:] if name == "g" else x[:, :, start:] for name, x in given.items()}


def called(attend: Any, given: dict[str, Tensor], rows: slice, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of some rows, and the gradients of the sum of their squares."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    out = attend(**leaves, **more)[:, :, rows]
    return out.detach(), dict(zip(leaves, torch.autograd.grad(out.square().sum(), list(leaves.values())), strict=True))


@pytest.mark.parametrize(
    ("kind", "at", "poison"),
    [
        *((kind, at, math.nan) for kind in STEPS for at in (16, TOKENS - 1)),
        *(("scalar", at, 3e38) for at in (1, 16, 21)),
        ("corrected", 21, 3e38),
    ],
)
def test_a_decay_of_0_replaces_the_state(kind: str, at: int, poison: float) -> None:
    """At a token inside a chunk, at its edge, and at the last one; so too with documents that end elsewhere."""
    given = drawn(kind)
    given["g"][:, at] = -math.inf
    given["v"][:, :, at - 1] = poison
    attend: Any = compile_attention(text(kind), backend="triton")
    exact: Any = compile_attention(text(kind), backend="reference")
    out, grads = called(attend, given, slice(at, None))
    alone, wanted = called(exact, from_token(given, at), slice(None))
    assert torch.allclose(out, alone, atol=1e-5)
    for name, x in from_token(grads, at).items():
        assert torch.allclose(x, wanted[name], atol=3e-5), name
    assert attend(**given, cu_seqlens=torch.tensor([0, 30, TOKENS]))[:, :, at:].isfinite().all()


@pytest.mark.parametrize("kind", STEPS)
def test_a_decay_of_0_of_a_step(kind: str) -> None:
    """A decay of 0 replaces the state that is handed on, even a state of NaN."""
    given = {name: x[:, :1] if name == "g" else x[:, :, :1] for name, x in drawn(kind).items()}
    given["g"] = torch.full_like(given["g"], -math.inf)
    attend: Any = compile_attention(text(kind), backend="triton")
    state = {"S": torch.full((1, 1, 16, 16), math.nan)}
    out, after = attend.step(given["q"], given["k"], given["v"], state, g=given["g"])
    exact, _ = attend.step(given["q"], given["k"], given["v"], {"S": torch.zeros(1, 1, 16, 16)}, g=given["g"])
    assert torch.allclose(out, exact, atol=1e-6)
    assert after["S"].isfinite().all()


@pytest.mark.parametrize("border", ["documents", "decay"])
@pytest.mark.parametrize("kind", ["scalar", "corrected", "stepping"])
def test_a_gradient_that_is_nan_crosses_no_border(kind: str, border: str) -> None:
    """Backwards it reached the tokens before, by 0 · NaN, and within a chunk those behind."""
    count, at = (9, 5) if kind == "stepping" else (20, 11)
    given = {name: x[:, :count] if name == "g" else x[:, :, :count] for name, x in drawn(kind).items()}
    more: dict[str, Any] = {"cu_seqlens": torch.tensor([0, at, count])} if border == "documents" else {}
    if border == "decay":
        given["g"][:, at] = -math.inf
    attend: Any = compile_attention(text(kind), backend="triton")
    for bad in (at, at - 1):
        found = []
        for value in (math.nan, 0.0):
            leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
            weights = torch.ones(1, 1, count, 16)
            weights[:, :, bad] = value
            grads = torch.autograd.grad(attend(**leaves, **more), list(leaves.values()), weights)
            found.append(dict(zip(leaves, grads, strict=True)))
        assert not found[0]["v"][:, :, bad].isfinite().all()
        for name, x in found[0].items():
            tokens = x.movedim(1, 2) if name == "g" else x
            exact = found[1][name].movedim(1, 2) if name == "g" else found[1][name]
            other = slice(0, at) if bad == at else slice(at, None)
            assert torch.allclose(tokens[:, :, other], exact[:, :, other], atol=1e-5), (name, bad)
