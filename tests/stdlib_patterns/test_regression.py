"""Test-time regression against a regression that is solved from scratch for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnc import compile_attention
from reference.regression import regression_at_test_time

CASES: list[tuple[int, dict[str, Any]]] = [
    (37, {"ridge": 1, "gamma": 1}),
    (45, {"ridge": 0.25, "gamma": 0.9}),
    (9, {"ridge": 3, "gamma": 0.5}),
    (1, {"ridge": 0.1, "gamma": 0.99}),
]
SMALL = {torch.float64: 1e-9, torch.float32: 2e-4}


def drawn(n: int, dtype: torch.dtype) -> list[Tensor]:
    """Draw q, k of length 1, v and beta; some betas are exactly 0 or 1."""
    sizes = ((2, 3, n, 5), (2, 3, n, 5), (2, 3, n, 4))
    q, k, v = (torch.randn(size, dtype=torch.float64) for size in sizes)
    beta = torch.rand(2, n, 3, dtype=torch.float64)
    beta[:, 3::7], beta[:, 5::11] = 0, 1
    k = torch.nn.functional.normalize(k, dim=-1)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, beta)]


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("n", "params"), CASES)
def test_output_states_and_gradients(n: int, params: dict[str, Any], backend: Any, dtype: torch.dtype) -> None:
    leaves = drawn(n, dtype)
    q, k, v, beta = leaves
    attend = compile_attention("test_time_regression", backend=backend, **params)
    out, states = attend(q, k, v, beta=beta, return_state=True)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted, last = regression_at_test_time(wide[0], wide[1], wide[2], beta=wide[3], **params)
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    ours = torch.autograd.grad((out.double() * weights).sum(), leaves)
    theirs = torch.autograd.grad((wanted * weights).sum(), wide)
    actual = [out, *(states[name] for name in ("P", "n", "S")), *ours]
    for a, b in zip(actual, [wanted, *last, *theirs], strict=True):
        largest = max(float(b.detach().abs().max()), 1.0)
        torch.testing.assert_close(a.double() / largest, b / largest, rtol=0, atol=SMALL[dtype])


@pytest.mark.parametrize("cut", [1, 20, 36])
def test_a_split_run_continues(cut: int) -> None:
    """Cuts include a first part of one token: the ridge must be added only once."""
    q, k, v, beta = (x.detach() for x in drawn(37, torch.float64))
    attend = compile_attention("test_time_regression", ridge=0.5, gamma=0.95)
    whole, last = attend(q, k, v, beta=beta, return_state=True)
    head, state = attend(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], beta=beta[:, :cut], return_state=True)
    rest, state = attend(
        q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], beta=beta[:, cut:], state=state, return_state=True
    )
    torch.testing.assert_close(torch.cat([head, rest], 2), whole)
    torch.testing.assert_close(state, last)


def test_without_forgetting_regression_equals_mesa() -> None:
    q, k, v, beta = (x.detach() for x in drawn(37, torch.float64))
    mesa = compile_attention("mesa")(
        q,
        k,
        v,
        g=torch.zeros(2, 37, 3, dtype=torch.float64),
        beta=beta,
        ridge=0.5 * torch.ones(3, 5, dtype=torch.float64),
    )
    actual = compile_attention("test_time_regression", ridge=0.5)(q, k, v, beta=beta)
    torch.testing.assert_close(actual, mesa, rtol=1e-6, atol=1e-7)


def test_each_prefix_is_its_own_regression() -> None:
    """Regression with a small ridge and many keys recovers a linear map."""
    q, k, _, beta = (x.detach() for x in drawn(200, torch.float64))
    truth = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    actual = compile_attention("test_time_regression", ridge=1e-9)(q, k, k @ truth, beta=beta.clamp(min=0.1))
    torch.testing.assert_close(actual[:, :, 20:], (q @ truth)[:, :, 20:], rtol=1e-5, atol=1e-5)
