"""Recurrence kernels pass nothing from tokens before a border to tokens after it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention


def test_nothing_crosses_a_border_by_kernels() -> None:
    """A chunk multiplies the tokens of another document by 0, so NaN before the border reached the result."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    gate, cut = -torch.rand(1, 20, 1), torch.tensor([0, 9, 20])
    v[:, :, 4] = math.nan
    attend = compile_attention("mamba2_ssd", backend="triton")
    inputs: dict[str, Any] = {"g": gate, "dt": torch.ones(1, 20, 1), "D": torch.ones(1)}
    out = attend(q, k, v, cu_seqlens=cut, **inputs)[:, :, 9:]
    later_inputs: dict[str, Any] = {name: x[:, 9:] if name != "D" else x for name, x in inputs.items()}
    alone = compile_attention("mamba2_ssd", backend="reference")(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:], **later_inputs)
    assert torch.allclose(out, alone, atol=1e-5)


TOKENS = 37
"""More tokens than two of the shortest chunks, which have 16."""

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


def draw_tensors(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {name: torch.randn(1, 1, TOKENS, 16) for name in "qkv"}
    tensors["k"] /= tensors["k"].norm(dim=-1, keepdim=True)
    tensors["g"] = -torch.rand(1, TOKENS, 1, *([16] if kind == "rows" else [])) * 0.1
    return tensors


def tokens_from(tensors: dict[str, Tensor], start: int) -> dict[str, Tensor]:
    return {name: x[:, start:] if name == "g" else x[:, :, start:] for name, x in tensors.items()}


def output_and_grads(
    attend: Any, tensors: dict[str, Tensor], rows: slice, **more: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output of some rows, and the gradients of the sum of their squares."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
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
    """The decay is 0 inside a chunk, at its edge or at the last token; also with document borders at other tokens."""
    tensors = draw_tensors(kind)
    tensors["g"][:, at] = -math.inf
    tensors["v"][:, :, at - 1] = poison
    attend: Any = compile_attention(text(kind), backend="triton")
    exact: Any = compile_attention(text(kind), backend="reference")
    out, grads = output_and_grads(attend, tensors, slice(at, None))
    alone, wanted = output_and_grads(exact, tokens_from(tensors, at), slice(None))
    assert torch.allclose(out, alone, atol=1e-5)
    for name, x in tokens_from(grads, at).items():
        assert torch.allclose(x, wanted[name], atol=3e-5), name
    assert attend(**tensors, cu_seqlens=torch.tensor([0, 30, TOKENS]))[:, :, at:].isfinite().all()


@pytest.mark.parametrize("kind", STEPS)
def test_a_decay_of_0_of_a_step(kind: str) -> None:
    """A decay of 0 replaces even a state of NaN that an earlier call returned."""
    tensors = {name: x[:, :1] if name == "g" else x[:, :, :1] for name, x in draw_tensors(kind).items()}
    tensors["g"] = torch.full_like(tensors["g"], -math.inf)
    attend: Any = compile_attention(text(kind), backend="triton")
    state = {"S": torch.full((1, 1, 16, 16), math.nan)}
    out, after = attend.step(tensors["q"], tensors["k"], tensors["v"], state, g=tensors["g"])
    exact, _ = attend.step(tensors["q"], tensors["k"], tensors["v"], {"S": torch.zeros(1, 1, 16, 16)}, g=tensors["g"])
    assert torch.allclose(out, exact, atol=1e-6)
    assert after["S"].isfinite().all()


@pytest.mark.parametrize("border", ["documents", "decay"])
@pytest.mark.parametrize("kind", ["scalar", "corrected", "stepping"])
def test_nan_gradients_cross_no_border(kind: str, border: str) -> None:
    """In the backward NaN reached tokens before the border by 0 · NaN, and within a chunk tokens after the border."""
    count, at = (9, 5) if kind == "stepping" else (20, 11)
    tensors = {name: x[:, :count] if name == "g" else x[:, :, :count] for name, x in draw_tensors(kind).items()}
    more: dict[str, Any] = {"cu_seqlens": torch.tensor([0, at, count])} if border == "documents" else {}
    if border == "decay":
        tensors["g"][:, at] = -math.inf
    attend: Any = compile_attention(text(kind), backend="triton")
    for bad in (at, at - 1):
        grads_of_calls = []
        for value in (math.nan, 0.0):
            leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
            weights = torch.ones(1, 1, count, 16)
            weights[:, :, bad] = value
            grads = torch.autograd.grad(attend(**leaves, **more), list(leaves.values()), weights)
            grads_of_calls.append(dict(zip(leaves, grads, strict=True)))
        assert not grads_of_calls[0]["v"][:, :, bad].isfinite().all()
        for name, x in grads_of_calls[0].items():
            tokens = x.movedim(1, 2) if name == "g" else x
            exact = grads_of_calls[1][name].movedim(1, 2) if name == "g" else grads_of_calls[1][name]
            unaffected = slice(0, at) if bad == at else slice(at, None)
            assert torch.allclose(tokens[:, :, unaffected], exact[:, :, unaffected], atol=1e-5), (name, bad)
