"""NaN, infinities and overflow of tokens that a row does not see reach no result of the row, by executors of the CPU.

Spoiled is one key, one query, or the gradients of one row; compared is what a call without the spoiled number gives,
everywhere but where the spoiled number is seen.
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
"""Tokens; the spoiled key; the spoiled row."""

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


def drawn(text: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """q, k, v, real inputs; other inputs."""
    generator = torch.Generator().manual_seed(5)
    given = {name: torch.randn(1, h, N, 8, generator=generator) for name, h in (("q", 4), ("k", 2), ("v", 2))}
    if "input x" in text:
        given["x"] = torch.rand(N, generator=generator) + 0.5
    if "sink" in text:
        given["sink"] = torch.randn(4, generator=generator)
    more = {}
    if "input kept" in text:
        more["kept"] = torch.rand(6, 6, generator=generator) < 0.6
        more["kept"] |= torch.eye(6, dtype=torch.bool)
    if "input id" in text:
        more["id"] = torch.randint(0, 4, (N,), generator=generator)
    return given, more


def called(
    attend: Any, given: dict[str, Tensor], more: dict[str, Any], weights: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and all gradients of its sum with weights."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    out = attend(**leaves, **more)
    grads = torch.autograd.grad(
        out, list(leaves.values()), weights.expand(out.shape), allow_unused=True, materialize_grads=True
    )
    return out.detach(), dict(zip(leaves, grads, strict=True))


@cache
def seeing(kind: str) -> Tensor:
    """(rows, keys): whose gradients say that a row depends on a key, by the reference."""
    attend: Any = compile_attention(TEXTS[kind])
    given, more = drawn(TEXTS[kind])
    leaves = {name: x.double().requires_grad_() for name, x in given.items()}
    out = attend.reference(**leaves, **more)
    found = torch.zeros(N, N, dtype=torch.bool)
    for row in range(N):
        (grad,) = torch.autograd.grad(out[:, :, row].square().sum(), [leaves["v"]], retain_graph=True)
        found[row] = (grad != 0).any(-1).any(0).any(0)
    return found


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, 3e38])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_key_that_is_not_seen(kind: str, value: float) -> None:
    """Scored rows failed for `inf` and large numbers, selections, values and weights for all."""
    text = TEXTS[kind]
    attend: Any = compile_attention(text)
    given, more = drawn(text)
    sees = seeing(kind)[:, K]
    weights = torch.randn(1, 4, N, 1, generator=torch.Generator().manual_seed(1)) * ~sees[:, None]
    reached = seeing(kind)[sees].any(0)  # keys of rows that see the spoiled key
    wanted, grads = called(attend, given, more, weights)
    for name in ("k", "v", "x") if "x" in given else ("k", "v"):
        spoiled = {**given, name: given[name].clone()}
        spoiled[name][K if name == "x" else (..., K, slice(3))] = value
        found, own = called(attend, spoiled, more, weights)
        assert same(found[:, :, ~sees], wanted[:, :, ~sees])
        assert same(own["q"][:, :, ~sees], grads["q"][:, :, ~sees])
        for of in ("k", "v"):
            assert same(own[of][:, :, ~reached], grads[of][:, :, ~reached]), (name, of)
        if "x" in given:
            assert same(own["x"][~reached], grads["x"][~reached])


@pytest.mark.parametrize("more", ["value x[k] * v", "score scale * dot(q, k) * x[k]", "weights x[k] * sigmoid(score)"])
def test_a_key_that_nobody_sees(more: str) -> None:
    """All gradients are those of a call with another key there; `x[k]` of a value had 0 · NaN."""
    attend: Any = compile_attention(f"{HEAD}{X}    visible 0 <= q - k < 5 and k % 7 != 3\n    {more}\n")
    given, _ = drawn("input x")
    weights = torch.randn(1, 4, N, 1, generator=torch.Generator().manual_seed(1))
    wanted, grads = called(attend, given, {}, weights)
    for name in ("k", "v", "x"):
        spoiled = {**given, name: given[name].clone()}
        spoiled[name][10 if name == "x" else (..., 10, slice(3))] = math.nan
        found, own = called(attend, spoiled, {}, weights)
        assert same(found, wanted)
        for of in given:
            assert same(own[of], grads[of]), (name, of)


@pytest.mark.parametrize("which", ["q", "gradient"])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_row_that_does_not_see_a_key(kind: str, which: Literal["q", "gradient"]) -> None:
    """The gradient of a key had 0 · NaN of rows that do not see the key, on every executor."""
    text = TEXTS[kind]
    attend: Any = compile_attention(text)
    given, more = drawn(text)
    reached = seeing(kind)[ROW]
    weights = torch.randn(1, 4, N, 1, generator=torch.Generator().manual_seed(1))
    others = torch.arange(N) != ROW
    _, grads = called(attend, given, more, weights * others[:, None])
    if which == "q":
        given["q"] = given["q"].clone()
        given["q"][:, :, ROW, 2] = math.nan
    else:
        weights[:, :, ROW] = math.nan
    out, own = called(attend, given, more, weights)
    assert out[:, :, others].isfinite().all()
    assert same(own["q"][:, :, others], grads["q"][:, :, others])
    for of in ("k", "v"):
        assert same(own[of][:, :, ~reached], grads[of][:, :, ~reached])
    if "x" in given:
        assert same(own["x"][~reached], grads["x"][~reached])
    if which == "gradient":
        assert not own["v"][:, :, ROW - 1 if kind == "value before" else reached].isfinite().all()


DECODED = {name: TEXTS[name] for name in ("pieces", "bias", "score", "value", "weights", "listed blocks")}


@pytest.mark.parametrize("kind", DECODED)
def test_a_slot_that_some_of_the_last_rows_see(kind: str) -> None:
    """Drafts are verified together: what the later ones see spoiled the first."""
    attend: Any = compile_attention(TEXTS[kind])
    given, more = drawn(TEXTS[kind])
    q, k, v = (given[name] for name in "qkv")
    inputs = {name: x for name, x in (*given.items(), *more.items()) if name not in ("q", "k", "v")}
    with torch.no_grad():
        wanted = attend.decode(q[:, :, -4:], k, v, kv_len=N, **inputs)
        for cache in (k, v):
            cache[:, :, -2] = math.nan
            found = attend.decode(q[:, :, -4:], k, v, kv_len=N, **inputs)
            assert same(found[:, :, :2], wanted[:, :, :2])
            assert found[:, :, 2:].isnan().any()
            cache[:, :, -2] = 0
