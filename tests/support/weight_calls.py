"""Calls of patterns with their own weights, keys or branches, compared with a reference of the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.verifying.accuracy import TIMES, UNITS
from cases.case import distance, leaf, real
from cases.system import System
from score_calls import assert_equals

Inputs = Mapping[str, Tensor]
Dense = Callable[..., Tensor]


def results(run: Dense, operands: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """Return out and the gradient of every floating-point operand, 0 if it has none, for a gradient of out."""
    out = run(**operands)
    wanted = {name: x for name, x in operands.items() if x.requires_grad}
    some: Any = torch.autograd.grad(out, tuple(wanted.values()), grad.to(out.dtype), allow_unused=True)
    grads = {
        f"d{name}": torch.zeros_like(x) if g is None else g for (name, x), g in zip(wanted.items(), some, strict=True)
    }
    return {"out": out.detach()} | grads


def grad_for(operands: Inputs) -> Tensor:
    q, v = operands["q"], operands["v"]
    return real(*q.shape[:3], v.shape[-1])


def check(run: Dense, dense: Dense, operands: Inputs) -> dict[str, Tensor]:
    """Check a run in fp64 against the reference and return its results."""
    grad = grad_for(operands)
    actual = results(run, operands, grad)
    assert_equals(actual, results(dense, operands, grad))
    return actual


def check_twice(run: Dense, system: System, operands: Inputs) -> None:
    """Check the rule of `runtime.verifying.accuracy`: twice the formula's error in the same dtype, plus a few units."""
    grad, dense = grad_for(operands), system.dense
    exact = {name: leaf(x, torch.float64) for name, x in operands.items()}
    wanted, actual = results(dense, exact, grad), results(run, operands, grad)
    near = operands if system.half else {name: leaf(x, torch.float32) for name, x in operands.items()}
    plain = {name: x.to(operands["q"].dtype) for name, x in results(dense, near, grad).items()}
    dtype, errors = operands["q"].dtype, {}
    for name, x in wanted.items():
        assert actual[name].dtype == dtype, name
        largest = float(torch.where(torch.isfinite(x), x, 0).abs().max()) if x.numel() else 0.0
        allowed = TIMES * distance(plain[name], x) + UNITS[dtype] * torch.finfo(dtype).eps * largest
        if not distance(actual[name], x) <= allowed:
            errors[name] = f"{distance(actual[name], x):.3g}, allowed {allowed:.3g}"
    assert not errors, errors
