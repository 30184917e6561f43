"""Weights that are sums are compiled as several attentions."""

from __future__ import annotations

import pytest

from attnc.compiler.ir import Pattern
from attnc.compiler.kernels.parts import in_parts
from attnc.compiler.kernels.score_formula import weights_of
from plan_calls import lowered

ROW = "    input a: real[batch, head, query]\n    input b: real[batch, head, query]\n"


def pattern(weights: str) -> Pattern:
    return lowered(f"pattern weighed\n    align end\n{ROW}    visible k <= q\n    weights {weights}\n")


def kinds(made: Pattern) -> list[str]:
    return [weights_of(node)[0] for node in made.nodes]


@pytest.mark.parametrize(
    "weights",
    [
        "sigmoid(score) - 0.1 * relu(score)",
        "softplus(score) / sum(softplus(score) for k)",
        "sigmoid(score) / count(visible for k)",
        "softmax(score) ** 2",
        "softmax(score) * sum(relu(score) for k)",
    ],
)
def test_one_kernel_or_none(weights: str) -> None:
    whole = pattern(weights)
    assert in_parts(whole) is whole


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("a[q] * softmax(score)", ["softmax"]),
        ("a[q] * softmax(score) + b[q]", ["softmax", "sum"]),
        ("a[q] * softmax(score) + b[q] - relu(score)", ["softmax", "sum"]),
        ("softmax(score) - b[q] * softplus(score) / sum(softplus(score) for k)", ["softmax", "share"]),
        ("-(softmax(score) / 2 - softmax(2 * score)) + sigmoid(score)", ["softmax", "softmax", "sum"]),
    ],
)
def test_parts(weights: str, expected: list[str]) -> None:
    parts = in_parts(pattern(weights))
    assert kinds(parts) == expected
    assert parts.combine is not None
    assert len({node.name for node in parts.nodes}) == len(parts.nodes)
