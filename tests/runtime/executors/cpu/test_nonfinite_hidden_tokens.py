"""NaN, infinities and overflow of tokens that a row does not see reach no result of that row, on the CPU's executors.

Each test makes one key, one query or the gradient of one row non-finite and compares all other results with a call
without the non-finite number.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from attnc import compile_attention

N, K, ROW = 41, 9, 23
"""Number of tokens; index of the non-finite key; index of the non-finite row."""

HEAD = "pattern p\n    align end\n"
CAUSAL = f"{HEAD}    visible k <= q\n"
WINDOW = f"{HEAD}    visible 0 <= q - k < 5 and k % 7 != 3\n"
X = "    input x: real[key]\n"

TEXTS = {
    "pieces": WINDOW,
    "bias": f"{WINDOW}    score scale * dot(q, k) + 0.5 ** (q - k)\n",
    "bias of an input": f"{HEAD}{X}    visible k <= q\n    score scale * dot(q, k) + 0.1 * x[k]\n",
    "score": f"{WINDOW}    score 2 * tanh(scale * dot(q, k))\n",
    "cosine": f"{CAUSAL}    score 3 * dot(q, k) / sqrt(dot(q, q) * dot(k, k))\n",
    "score of an input": f"{HEAD}{X}    visible k <= q\n    score scale * dot(q, k) * x[k]\n",
    "extra logit": f"{HEAD}    learned sink: real[head]\n    visible k <= q\n    weights softmax(extra = sink)\n",
    "value": f"{HEAD}{X}    visible k <= q\n    value x[k] * v\n",
    "value before": f"{WINDOW}    value v + v[k - 1] if k > 0 else v\n",
    "weights": f"{CAUSAL}    weights relu(score) + 0.1\n",
    "passes": f"{CAUSAL}    weights exp(score) / sum(exp(score) for k if k % 2 == q % 2 or k == q)\n",
    "branches": f"{HEAD}    branch a\n        visible q - k < 5 and k <= q\n    branch b\n        visible k <= q\n"
    "        value 2 * v\n    combine a - 0.3 * b\n",
    "listed blocks": f"{HEAD}    input kept: bool[rows, blocks]\n    visible kept[q // 8, k // 8] and k <= q\n",
    "chosen blocks": f"{HEAD}    select best\n        over b = k // 8\n        score b % 3\n        from b.end <= q\n"
    "        keep rank < 2\n        always q in b\n    visible k in best and k <= q\n",
    "chosen tokens": f"{HEAD}    select best\n        per head\n        score (k * 3) % 7 + head\n"
    "        keep rank < 20\n    visible k in best and q in best and k <= q\n",
    "blocks by ids": f"{HEAD}    input id: int[key]\n    select best\n        over b = id[k] % 8\n        score b % 2\n"
    "        keep rank < 2\n    visible k in best and k <= q\n",
}


def draw_operands(text: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw q, k, v and real inputs as one dict, all other inputs as a second dict."""
    generator = torch.Generator().manual_seed(5)
    tensors = {name: torch.randn(1, h, N, 8, generator=generator) for name, h in (("q", 4), ("k", 2), ("v", 2))}
    if "input x" in text:
        tensors["x"] = torch.rand(N, generator=generator) + 0.5
    if "sink" in text:
        tensors["sink"] = torch.randn(4, generator=generator)
    more = {}
    if "input kept" in text:
        more["kept"] = torch.rand(6, 6, generator=generator) < 0.6
        more["kept"] |= torch.eye(6, dtype=torch.bool)
    if "input id" in text:
        more["id"] = torch.randint(0, 4, (N,), generator=generator)
    return tensors, more


def output_and_grads(
    attend: Any, tensors: dict[str, Tensor], more: dict[str, Any], weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and all gradients of its weighted sum."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out = attend(**leaves, **more)
    grads = torch.autograd.grad(
        out, list(leaves.values()), weights.expand(out.shape), allow_unused=True, materialize_grads=True
    )
    return out.detach(), dict(zip(leaves, grads, strict=True))


@cache
def dependences(kind: str) -> Tensor:
    """Return (rows, keys): whether the reference's gradients make a row depend on a key."""
    attend: Any = compile_attention(TEXTS[kind])
    tensors, more = draw_operands(TEXTS[kind])
    leaves = {name: x.double().requires_grad_() for name, x in tensors.items()}
    out = attend.reference(**leaves, **more)
    sees = torch.zeros(N, N, dtype=torch.bool)
    for row in range(N):
        (grad,) = torch.autograd.grad(out[:, :, row].square().sum(), [leaves["v"]], retain_graph=True)
        sees[row] = (grad != 0).any(-1).any(0).any(0)
    return sees


def is_close(actual: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(actual, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, 3e38])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_nonfinite_key_reaches_no_row_that_does_not_see_it(kind: str, value: float) -> None:
    """Score patterns failed for `inf` and large numbers; selections, values and weight formulas for every number."""
    text = TEXTS[kind]
    attend: Any = compile_attention(text)
    tensors, more = draw_operands(text)
    sees = dependences(kind)[:, K]
    weights = torch.randn(1, 4, N, 1, generator=torch.Generator().manual_seed(1)) * ~sees[:, None]
    reached = dependences(kind)[sees].any(0)  # all keys of the rows that see the non-finite key
    wanted, grads = output_and_grads(attend, tensors, more, weights)
    for name in ("k", "v", "x") if "x" in tensors else ("k", "v"):
        spoiled = {**tensors, name: tensors[name].clone()}
        spoiled[name][K if name == "x" else (..., K, slice(3))] = value
        result, spoiled_grads = output_and_grads(attend, spoiled, more, weights)
        assert is_close(result[:, :, ~sees], wanted[:, :, ~sees])
        assert is_close(spoiled_grads["q"][:, :, ~sees], grads["q"][:, :, ~sees])
        for of in ("k", "v"):
            assert is_close(spoiled_grads[of][:, :, ~reached], grads[of][:, :, ~reached]), (name, of)
        if "x" in tensors:
            assert is_close(spoiled_grads["x"][~reached], grads["x"][~reached])


@pytest.mark.parametrize("more", ["value x[k] * v", "score scale * dot(q, k) * x[k]", "weights x[k] * sigmoid(score)"])
def test_a_nonfinite_key_that_no_row_sees(more: str) -> None:
    """All gradients equal those of a call with a finite key in its place; `x[k]` in a value gave 0 · NaN."""
    attend: Any = compile_attention(f"{HEAD}{X}    visible 0 <= q - k < 5 and k % 7 != 3\n    {more}\n")
    tensors, _ = draw_operands("input x")
    weights = torch.randn(1, 4, N, 1, generator=torch.Generator().manual_seed(1))
    wanted, grads = output_and_grads(attend, tensors, {}, weights)
    for name in ("k", "v", "x"):
        spoiled = {**tensors, name: tensors[name].clone()}
        spoiled[name][10 if name == "x" else (..., 10, slice(3))] = math.nan
        result, spoiled_grads = output_and_grads(attend, spoiled, {}, weights)
        assert is_close(result, wanted)
        for of in tensors:
            assert is_close(spoiled_grads[of], grads[of]), (name, of)


@pytest.mark.parametrize("which", ["q", "gradient"])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_nonfinite_row_reaches_no_key_that_it_does_not_see(kind: str, which: Literal["q", "gradient"]) -> None:
    """On every executor the gradient of a key contained 0 · NaN from rows that do not see the key."""
    text = TEXTS[kind]
    attend: Any = compile_attention(text)
    tensors, more = draw_operands(text)
    reached = dependences(kind)[ROW]
    weights = torch.randn(1, 4, N, 1, generator=torch.Generator().manual_seed(1))
    other_rows = torch.arange(N) != ROW
    _, grads = output_and_grads(attend, tensors, more, weights * other_rows[:, None])
    if which == "q":
        tensors["q"] = tensors["q"].clone()
        tensors["q"][:, :, ROW, 2] = math.nan
    else:
        weights[:, :, ROW] = math.nan
    out, spoiled_grads = output_and_grads(attend, tensors, more, weights)
    assert out[:, :, other_rows].isfinite().all()
    assert is_close(spoiled_grads["q"][:, :, other_rows], grads["q"][:, :, other_rows])
    for of in ("k", "v"):
        assert is_close(spoiled_grads[of][:, :, ~reached], grads[of][:, :, ~reached])
    if "x" in tensors:
        assert is_close(spoiled_grads["x"][~reached], grads["x"][~reached])
    if which == "gradient":
        assert not spoiled_grads["v"][:, :, ROW - 1 if kind == "value before" else reached].isfinite().all()


DECODED = {name: TEXTS[name] for name in ("pieces", "bias", "score", "value", "weights", "listed blocks")}


@pytest.mark.parametrize("kind", DECODED)
def test_a_nonfinite_slot_that_only_later_rows_see(kind: str) -> None:
    """Draft tokens are verified together: a key that only later rows see reached the first rows."""
    attend: Any = compile_attention(TEXTS[kind])
    tensors, more = draw_operands(TEXTS[kind])
    q, k, v = (tensors[name] for name in "qkv")
    inputs = {name: x for name, x in (*tensors.items(), *more.items()) if name not in ("q", "k", "v")}
    with torch.no_grad():
        wanted = attend.decode(q[:, :, -4:], k, v, kv_len=N, **inputs)
        for cache in (k, v):
            cache[:, :, -2] = math.nan
            result = attend.decode(q[:, :, -4:], k, v, kv_len=N, **inputs)
            assert is_close(result[:, :, :2], wanted[:, :, :2])
            assert result[:, :, 2:].isnan().any()
            cache[:, :, -2] = 0
