"""The recipes of docs/cookbook.md against dense torch, written from the page's sentences and without attnc.

The `.attn` texts are read from the page. Each is called at an odd size, in fp64 and fp32. Its output and
the gradients of q, k, v and every real input are compared with those of the dense computation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from attnc import compile_attention

PAGE = Path(__file__).parent.parent / "docs" / "cookbook.md"
TEXT = PAGE.read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^```attn (\w+)\.attn\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))

TOKENS, BATCH, HEADS, DK, DV = 37, 2, 4, 6, 5
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}

Inputs = dict[str, Tensor]
Dense = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A recipe: its parameters and inputs, and the dense computation of its result."""

    dense: Dense
    parameters: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Inputs] = dict
    tokens: int = TOKENS


# --- dense torch -----------------------------------------------------------------------------------------------------


def pairs(tokens: int, rule: Callable[[int, int], bool]) -> Tensor:
    """Return the mask of a rule by calling it for every query and key."""
    return torch.tensor([[rule(q, k) for k in range(tokens)] for q in range(tokens)])


def softmax_over(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return softmax_over(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, visible) @ v


def masked(rule: Callable[[int, int], bool]) -> Dense:
    """Return attention under a rule that all heads and batch entries share."""
    return lambda q, k, v: attention(q, k, v, pairs(q.shape[2], rule))


CAUSAL = pairs(TOKENS, lambda q, k: k <= q)


# --- the recipes -----------------------------------------------------------------------------------------------------

WINDOWS = [1, 3, 8, 64]
PREFIXES = [5, 20]
LENGTHS = [[1, 13, 23], [30, 2, 5]]
GRID = (9, 11)
VIDEO = (5, 6)  # half of an even number of tokens would be a distance on the edge of a window
COPY = 19


def head_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    masks = [pairs(TOKENS, lambda i, j, w=width: i - w < j <= i) for width in WINDOWS]  # type: ignore[misc]
    return attention(q, k, v, torch.stack(masks))


def powers_of_two(q: int, k: int) -> bool:
    return k in {q, *(q - 2**j for j in range(10))}


def prefix_window(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor) -> Tensor:
    masks = [pairs(TOKENS, lambda i, j, p=p: j < p or i - 9 < j <= i) for p in prefix.tolist()]  # type: ignore[misc]
    return attention(q, k, v, torch.stack(masks)[:, None])


def dilated_sinks(q: int, k: int) -> bool:
    return k <= q and (k < 2 or k in {q - 3 * step for step in range(4)})


def packed_global(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
    """Compute each document separately, with its first row and column visible."""
    rows = []
    for entry, lengths in enumerate(LENGTHS):
        outputs, start = [], 0
        for length in lengths:
            part = slice(start, start + length)
            mask = pairs(length, lambda i, j: j - 3 <= i <= j + 3)
            mask[0, :] = mask[:, 0] = True
            outputs.append(attention(q[entry, :, part], k[entry, :, part], v[entry, :, part], mask))
            start += length
        rows.append(torch.cat(outputs, 1))
    return torch.stack(rows)


def diffusion_blocks(q: int, k: int) -> bool:
    noised_q, noised_k = q < COPY, k < COPY
    block_q, block_k = (q if noised_q else q - COPY) // 4, (k if noised_k else k - COPY) // 4
    if noised_q and noised_k:
        return block_q == block_k
    if noised_q:
        return block_k < block_q
    return not noised_k and block_k <= block_q


def torus(q: int, k: int) -> bool:
    height, width = GRID
    y, x = divmod(q, width)
    near = {((y + 2 * i) % height, (x + 2 * j) % width) for i in range(-2, 3) for j in range(-2, 3)}
    return divmod(k, width) in near


def video_radial(q: int, k: int) -> bool:
    per_frame = VIDEO[1]
    gap, reach = abs(q // per_frame - k // per_frame), float(per_frame)
    while gap >= 1:
        gap, reach = gap // 2, reach / 2
    return abs(q % per_frame - k % per_frame) < reach


def alibi_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / DK**0.5
    slopes = q.new_tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return softmax_over(2 * torch.tanh(scores / 2) - slopes[:, None, None] * distance, CAUSAL) @ v


def differential_attention(q: Tensor, k: Tensor, v: Tensor, lambda_: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    difference = attention(q1, k1, v, CAUSAL) - lambda_[:, None, None] * attention(q2, k2, v, CAUSAL)
    return 0.2 * difference / difference.square().mean(-1, keepdim=True).sqrt()


def routed_tokens(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Compute each head separately, on the tokens that it keeps."""
    out = v.new_zeros(*q.shape[:3], v.shape[-1])
    for b in range(BATCH):
        for h in range(HEADS):
            order = sorted(range(TOKENS), key=lambda t, b=b, h=h: -gate[b, h, t].item())  # type: ignore[misc]
            kept = sorted(order[:11])
            among = attention(q[b, h, kept], k[b, h, kept], v[b, h, kept], pairs(11, lambda i, j: j <= i))
            out[b, h, kept] = torch.sigmoid(gate[b, h, kept])[:, None] * among
    return out


def window_and_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, mix: Tensor) -> Tensor:
    """Compute the state token by token, directly from the recurrence."""
    near = attention(q, k, v, pairs(TOKENS, lambda i, j: i - 7 < j <= i))
    unit = functional.normalize(k, dim=-1)
    state, reads = q.new_zeros(BATCH, HEADS, DK, DV), []
    for t in range(TOKENS):
        state = g[:, t, :, None, None].exp() * state
        error = v[:, :, t] - torch.einsum("bhk,bhkv->bhv", unit[:, :, t], state)
        state = state + beta[:, t, :, None, None] * unit[:, :, t, :, None] * error[:, :, None, :]
        reads.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t] / DK**0.5, state))
    share = mix.transpose(1, 2)[..., None]
    return share * near + (1 - share) * torch.stack(reads, 2)


def documents() -> Inputs:
    rows = [torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)) for lengths in LENGTHS]
    return {"doc": torch.stack(rows)}


def gates() -> Inputs:
    g, beta, mix = torch.rand(3, BATCH, TOKENS, HEADS, dtype=torch.float64)
    return {"g": -2 * g, "beta": beta, "mix": mix}


CASES = {
    "head_windows": Case(head_windows, {"window": WINDOWS}),
    "powers_of_two": Case(masked(powers_of_two)),
    "prefix_window": Case(prefix_window, {"window": 9}, lambda: {"prefix": torch.tensor(PREFIXES)}),
    "dilated_sinks": Case(masked(dilated_sinks), {"window": 4, "dilation": 3, "sinks": 2}),
    "packed_global": Case(packed_global, {"reach": 3}, documents),
    "diffusion_blocks": Case(masked(diffusion_blocks), {"length": COPY, "block": 4}, tokens=2 * COPY),
    "torus": Case(masked(torus), {"height": GRID[0], "width": GRID[1]}, tokens=GRID[0] * GRID[1]),
    "video_radial": Case(masked(video_radial), {"frames": VIDEO[0], "per_frame": VIDEO[1]}, tokens=VIDEO[0] * VIDEO[1]),
    "alibi_softcap": Case(alibi_softcap, {"cap": 2}),
    "differential_attention": Case(
        differential_attention, {}, lambda: {"lambda_": torch.rand(HEADS, dtype=torch.float64)}
    ),
    "routed_tokens": Case(
        routed_tokens, {"topk": 11}, lambda: {"gate": torch.randn(BATCH, HEADS, TOKENS, dtype=torch.float64)}
    ),
    "window_and_delta": Case(window_and_delta, {"window": 7}, gates),
}


def results(call: Dense, tensors: Inputs) -> dict[str, Tensor]:
    """Return the output of a call, and the gradient of each real tensor, under fixed weights of the output."""
    leaves = {name: x.detach().clone().requires_grad_() if x.is_floating_point() else x for name, x in tensors.items()}
    out = call(**leaves)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    real = {name: x for name, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad((out * weights).sum(), list(real.values()))
    return {"output": out.detach(), **{f"gradient of {name}": x for name, x in zip(real, gradients, strict=True)}}


def test_every_recipe_has_a_case() -> None:
    assert set(RECIPES) == set(CASES)
    assert len(RECIPES) == TEXT.count("\n```attn ")


def test_every_recipe_is_in_the_table_and_has_a_call() -> None:
    sections = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    recipes = {title: body for title, body in sections if "```attn " in body}
    assert list(recipes) == re.findall(r"^\| \[([^]]+)\]\(#", TEXT, re.MULTILINE)
    for title, body in recipes.items():
        assert "```python\n" in body and ".backward()" in body, title


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_recipe(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    attend = compile_attention(RECIPES[name], strict=True, **case.parameters)
    drawn = {
        "q": torch.randn(BATCH, HEADS, case.tokens, DK, dtype=torch.float64),
        "k": torch.randn(BATCH, HEADS, case.tokens, DK, dtype=torch.float64),
        "v": torch.randn(BATCH, HEADS, case.tokens, DV, dtype=torch.float64),
        **case.inputs(),
    }
    expected = results(case.dense, drawn)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in drawn.items()}
    actual = results(attend, inputs)
    assert actual.keys() == expected.keys()
    for part, value in expected.items():
        difference = (actual[part].double() - value).abs().max() / value.abs().max().clamp(min=1)
        assert difference < TOLERANCE[dtype], f"{part}: {difference.item()}"
