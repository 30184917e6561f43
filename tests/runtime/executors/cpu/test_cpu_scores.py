"""The cpu executor agrees with the reference executor on every form of score, in results and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import UnsupportedError, compile_attention
from attnc.runtime.executors.cpu import row_blocks
from cases.case import Shape, leaf, real
from score_calls import assert_equals, executor, grads_for, results

N = 29
DECLARATIONS = {
    "bias[": "learned bias: real[head, length]",
    "of_token[": "input of_token: real[batch, token]",
    "times": "learned times: real[head]",
    "direction": "learned direction: real[head, dk]",
    "near[": "learned near: real[span, dk]",
    "by_head[": "learned by_head: real[head, span, dk]",
    "grid[": "learned grid: real[3, 4, dk]",
    "edges[": "input edge: int[batch, query, key]\n    learned edges: real[kv_head, 5, dk]",
    "doc[": "input doc: int[batch, token]",
    "sink": "learned sink: real[head, 3]",
}
SCORES = [
    "scale * dot(q, k) + (k - q) / 7",
    "2 * scale * dot(q, k) - q % 5",
    "dot(k, q) / 2 + (1 if q // 8 == k // 8 else -1)",
    "0 * dot(q, k) + (q - k) % 3",
    "-dot(q, k)",
    "scale * dot(q, k) - scale * dot(q, k) / 3 + (0.5 if (q - k) % 4 == 0 else 0)",
    "scale * (dot(q, k) + (k - q)) - (head + 1) / 2 * abs(q - k)",
    "scale * dot(q, k) + 1000",
    "scale * dot(q, k) + log(1 + abs(q - k))",
    "scale * dot(q, k) + bias[abs(q - k)]",
    "scale * dot(q, k) + (bias[q - k] if q > k else 1)",
    "scale * dot(q, k) + of_token[q] * of_token[k]",
    "scale * dot(q, k) * times",
    "scale * dot(q, k) + dot(q, direction) / 3",
    "dot(q, q) / 9 + scale * dot(q, k)",
    "tanh(dot(q, k)) + bias[min(abs(k - q), 3)]",
    "scale * dot(q, k) + sum(of_token[j] for j in min(q, k) .. max(q, k))",
    "scale * dot(q, k) + max(of_token[j] for j in min(q, k) .. max(q, k) + 1)",
    "scale * dot(q, k) + dot(q, near[k - q + 30])",
    "dot(q, k) / 4 + dot(near[q - k + 30], k) - dot(q, near[k % 5])",
    "scale * dot(q, k) + (dot(q, by_head[q - k]) if q > k else dot(k, by_head[k - q]) / 2)",
    "dot(q, k) + tanh(dot(q, near[abs(q - k)])) * times",
    "scale * dot(q, k) + dot(q, grid[q % 3, k % 4])",
    "scale * dot(q, k) + dot(q, edges[edge[q, k]])",
    "scale * dot(q, k) + dot(near[k], near[q + 2]) + dot(direction, near[abs(q - k)])",
]
MASKS = ["k <= q", "k < q", "q - k < 9 and k <= q", "k <= q and (q - k) % 3 == 0", "abs(q - k) < 5", "doc[q] == doc[k]"]
EXTRAS = ["", "sink", "dot(q, direction)", "2 * of_token[q]", "scale * dot(q, q)"]


def pattern(score: str, mask: str = "k <= q", extra: str = "") -> str:
    declared = [line for name, line in DECLARATIONS.items() if name in f"{score} {mask} {extra}"]
    weights = [f"weights softmax(score, extra = {extra})"] if extra else []
    return "\n    ".join(["pattern scored", *declared, f"visible {mask}", f"score {score}", *weights]) + "\n"


def operands_of(text: str, n: int = N) -> dict[str, Tensor]:
    s = Shape(n, n)
    sizes = {"q": (s.batch, s.heads, n, s.dk), "k": (s.batch, s.kv_heads, n, s.dk), "v": (s.batch, s.kv_heads, n, s.dv)}
    drawn = {
        "bias": real(s.heads, n),
        "of_token": real(s.batch, n),
        "times": real(s.heads),
        "direction": real(s.heads, s.dk),
        "near": real(61, s.dk),
        "by_head": real(s.heads, 61, s.dk),
        "grid": real(3, 4, s.dk),
        "edge": torch.randint(0, 5, (s.batch, n, n)),
        "edges": real(s.kv_heads, 5, s.dk),
        "doc": torch.randint(0, 4, (s.batch, n)).sort(-1).values,
        "sink": real(s.heads, 3),
    }
    named = {name: real(*size) for name, size in sizes.items()}
    named |= {name: x for name, x in drawn.items() if f" {name}:" in text}
    return {name: leaf(x, torch.float64) for name, x in named.items()}


def check_agrees(text: str) -> None:
    """Check results and gradients: first every operand requires a gradient, then q, k and v alone."""
    attend, operands = compile_attention(text), operands_of(text)
    grads = grads_for(operands)
    alone = {name: x if name in ("q", "k", "v") else x.detach() for name, x in operands.items()}
    for inputs in (operands, alone):
        assert_equals(
            results(executor(attend, "cpu"), inputs, grads), results(executor(attend, "reference"), inputs, grads)
        )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_scores(score: str, mask: str) -> None:
    check_agrees(pattern(score, mask))


@pytest.mark.parametrize("score", SCORES[::4])
@pytest.mark.parametrize("extra", EXTRAS[1:])
def test_extra_logits(extra: str, score: str) -> None:
    check_agrees(pattern(score, "k <= q", extra))
    check_agrees(pattern(score, "k < q", extra))


@pytest.mark.parametrize("score", ["(k - q) / 4", "of_token[k] + q % 2", "2"])
def test_a_score_without_vectors(score: str) -> None:
    """q and k do not enter the score, so their gradients are 0."""
    text = pattern(score)
    attend, operands = compile_attention(text), operands_of(text)
    values = operands["v"]
    grad = real(*operands["q"].shape[:3], values.shape[-1])
    wanted = torch.autograd.grad(executor(attend, "reference")(**operands)[0], values, grad)[0]
    blind = {name: x if name == "v" else x.detach() for name, x in operands.items()}
    for inputs in (operands, blind):
        leaves = [inputs[name] for name in ("q", "k", "v") if inputs[name].requires_grad]
        *nothing, result = torch.autograd.grad(executor(attend, "cpu")(**inputs)[0], leaves, grad)
        assert_equals({"dv": result}, {"dv": wanted})
        assert not any(bool(x.any()) for x in nothing)


def test_second_derivatives_are_refused() -> None:
    """Second derivatives raise an error instead of being silently dropped."""
    text = pattern("tanh(dot(q, k))")
    inputs: dict[str, Any] = operands_of(text, 4)
    first = torch.autograd.grad(compile_attention(text)(**inputs).sum(), inputs["q"], create_graph=True)[0]
    with pytest.raises(UnsupportedError, match="second derivatives"):
        torch.autograd.grad(first.sum() + inputs["q"].sum(), inputs["q"])


def test_scores_that_grow_within_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose first scores are far lower keeps the digits of its large scores: at -12511 three digits were lost."""
    text = (
        "pattern p\n    input b: real[batch, key]\n    align end\n    visible k <= q\n"
        "    score 3 * tanh(scale * dot(q, k)) + b[k]\n"
    )
    monkeypatch.setattr(row_blocks, "ELEMENTS", 1 << 11)  # blocks of few rows
    n = 300
    bias = torch.where(torch.arange(n) < n - 50, -12511.3, 0.0)[None]
    inputs = {name: torch.randn(1, 1, n, 8) for name in "qkv"} | {"b": bias}
    attend: Any = compile_attention(text, backend="cpu")

    def run(dtype: torch.dtype) -> list[Tensor]:
        operands = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
        out, lse = attend(**operands, return_lse=True)
        rows = slice(n - 40, n)
        return [
            out[:, :, rows],
            lse[:, :, rows],
            *torch.autograd.grad(out[:, :, rows].square().sum(), [*operands.values()]),
        ]

    for result, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)
