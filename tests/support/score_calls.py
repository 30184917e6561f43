"""Calls of patterns with their own scores, compared with a reference that also returns the LSE."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnc import Attention
from attnc.runtime.verifying.accuracy import TIMES, UNITS
from cases.case import distance, leaf, real
from reference.attention import Result

Inputs = Mapping[str, Tensor]
Run = Callable[..., Result]

EXECUTORS = ["cpu", "reference"]


def executor(attend: Attention, name: str) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, **inputs: Any) -> Result:
        if name == "cpu":
            return attend(q, k, v, return_lse=True, **inputs)
        return attend.reference(q, k, v, return_lse=True, **inputs)

    return run


def results(run: Run, operands: Inputs, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return out, lse and the gradient of every floating-point operand, for `grads` of out and lse."""
    out, lse = run(**operands)
    wanted = {name: x for name, x in operands.items() if x.requires_grad}
    heads = tuple(grad.to(x.dtype) for grad, x in zip(grads, (out, lse), strict=True))
    gradients = torch.autograd.grad((out, lse), tuple(wanted.values()), heads)
    return {"out": out.detach(), "lse": lse.detach()} | {
        f"d{name}": x for name, x in zip(wanted, gradients, strict=True)
    }


def grads_for(operands: Inputs) -> tuple[Tensor, Tensor]:
    """Draw gradients of out and lse, rounded to their dtypes."""
    rows, dtype = operands["q"].shape[:3], operands["q"].dtype
    grad_out, grad_lse = real(*rows, operands["v"].shape[-1]), real(*rows)
    return grad_out.to(dtype), grad_lse.to(torch.promote_types(dtype, torch.float32))


def assert_equals(actual: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, x in wanted.items():
        assert actual[name].shape == x.shape, name
        assert torch.allclose(actual[name], x, rtol=1e-10, atol=1e-10), (
            f"{name}: off by {distance(actual[name], x):.3g}"
        )


def check(run: Run, dense: Run, operands: Inputs) -> dict[str, Tensor]:
    """Check a run in fp64 against the reference and return its results."""
    grads = grads_for(operands)
    actual = results(run, operands, grads)
    assert_equals(actual, results(dense, operands, grads))
    return actual


def check_twice(run: Run, dense: Run, operands: Inputs) -> None:
    """Check the rule of `runtime.verifying.accuracy` for every operand: twice the dense error, plus a few units."""
    grads = grads_for(operands)
    wanted = results(dense, {name: leaf(x, torch.float64) for name, x in operands.items()}, grads)
    plain, actual = results(dense, operands, grads), results(run, operands, grads)
    assert {name: x.dtype for name, x in actual.items()} == {name: x.dtype for name, x in plain.items()}
    errors = {}
    for name, x in wanted.items():
        dtype = operands["q"].dtype if name in ("out", "lse") else operands[name[1:]].dtype
        largest = float(torch.where(torch.isfinite(x), x, 0).abs().max())
        allowed = TIMES * distance(plain[name], x) + UNITS[dtype] * torch.finfo(dtype).eps * largest
        error = distance(actual[name], x)
        if not error <= allowed:
            errors[name] = f"{error:.3g}, allowed {allowed:.3g}"
    assert not errors, errors


def check_nothing_seen(actual: Mapping[str, Tensor], seeing: Tensor) -> None:
    """Check that rows (B, Hq, Nq) without visible keys are exactly zero, and everything else is finite."""
    assert torch.equal(actual["lse"] == -math.inf, ~seeing)
    assert not actual["out"][~seeing].any()
    assert not actual["dq"][~seeing].any()
    assert all(bool(x.isfinite().all()) for name, x in actual.items() if name != "lse")
    assert bool(actual["lse"][seeing].isfinite().all())
