"""Every function of the registry has a text in Triton and a call in torch, and they agree with its record."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnc import compile_attention
from attnc.compiler.kernels.value_text import TRITON_CALLS
from attnc.runtime.values.functions import FUNCTIONS
from attnc.spec.names.builtins import FLOAT_BUILTINS
from attnc.spec.number_functions import FLOAT_ALONE, NUMBER_FUNCTIONS

CORNERS = {"relu"}
"""Functions whose derivatives are choices, which `compiler.ir.derivatives` writes."""
POINTS = [-30.0, -3.5, -1.0, -0.25, 0.3, 1.0, 2.75, 30.0]


def test_the_tables_are_total() -> None:
    assert NUMBER_FUNCTIONS.keys() <= TRITON_CALLS.keys()
    assert NUMBER_FUNCTIONS.keys() <= FUNCTIONS.keys()
    assert FLOAT_ALONE.keys() <= FLOAT_BUILTINS.keys()
    assert {name for name, function in NUMBER_FUNCTIONS.items() if not function.slopes} == CORNERS


def operands_of(name: str) -> list[tuple[float, ...]]:
    points = [x for x in POINTS if x > 0] if name in ("sqrt", "log", "log2") else POINTS
    if len(NUMBER_FUNCTIONS[name].parameters) == 1:
        return [(x,) for x in points]
    return [(x, y) for x in points for y in points]


@pytest.mark.parametrize("name", NUMBER_FUNCTIONS)
def test_torch_computes_the_function(name: str) -> None:
    function = NUMBER_FUNCTIONS[name]
    for operands in operands_of(name):
        ours = FUNCTIONS[name](*(torch.tensor(x, dtype=torch.float64) for x in operands))
        assert float(ours) == pytest.approx(function.evaluate(*operands), rel=1e-14, abs=1e-300), operands


@pytest.mark.parametrize("name", sorted(NUMBER_FUNCTIONS.keys() - CORNERS))
def test_slopes_are_derivatives(name: str) -> None:
    function = NUMBER_FUNCTIONS[name]

    def formula(op: str, *operands: Any) -> Any:
        return FUNCTIONS[op](*(torch.as_tensor(x, dtype=torch.float64) for x in operands))

    for operands in (operands for operands in operands_of(name) if max(map(abs, operands)) < 4):
        leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in operands]
        result = FUNCTIONS[name](*leaves)
        gradients = torch.autograd.grad(result, leaves)
        for slope, gradient in zip(function.slopes, gradients, strict=True):
            found = torch.as_tensor(slope(formula, *leaves, result), dtype=torch.float64)
            if function.divisor is not None:
                found = found / function.divisor(formula, *leaves, result)
            assert float(found) == pytest.approx(float(gradient), rel=1e-12, abs=1e-300), operands


@pytest.mark.parametrize("name", NUMBER_FUNCTIONS)
def test_signs_and_finiteness(name: str) -> None:
    function = NUMBER_FUNCTIONS[name]
    values = [function.evaluate(*operands) for operands in operands_of(name)]
    if function.sign != "any":
        assert all(value > 0 if function.sign == "positive" else value >= 0 for value in values)
    if function.is_finite:
        huge = [function.evaluate(*([x] * len(function.parameters))) for x in (-1e300, 1e300)]
        assert all(map(math.isfinite, huge))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_score_may_call_erf(backend: Any) -> None:
    text = "pattern p\n    visible k <= q\n    score 2 * erf(scale * dot(q, k)) - (q - k) / 8\n"
    attend = compile_attention(text, backend=backend)
    q, k, v = (torch.randn(1, 2, 33, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scores = 2 * torch.erf(q @ k.mT / 4) - (torch.arange(33)[:, None] - torch.arange(33)) / 8
    wanted = scores.masked_fill(~torch.ones(33, 33).tril().bool(), -torch.inf).softmax(-1) @ v
    ours = attend(q, k, v)
    torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-12)
    grad = torch.randn_like(wanted)
    gradients = (torch.autograd.grad(out, (q, k, v), grad) for out in (ours, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
