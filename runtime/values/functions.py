"""Implementations of the IR's floating-point functions on tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from attnc.runtime.process.vector_math import settle

settle()


def _larger(*operands: Tensor) -> Tensor:
    """Return the largest operand; the first of several equal ones receives the whole gradient."""
    result = operands[0]
    for other in operands[1:]:
        result = torch.where((result >= other) | result.isnan(), result, other)
    return result


def _smaller(*operands: Tensor) -> Tensor:
    """Return the smallest operand; the first of several equal ones receives the whole gradient."""
    result = operands[0]
    for other in operands[1:]:
        result = torch.where((result <= other) | result.isnan(), result, other)
    return result


def _normalised(x: Tensor) -> Tensor:
    """Return x / ‖x‖, and 0 for the zero vector."""
    return _divide_by_root(x, x.square().sum(-1, keepdim=True))


def _rms(x: Tensor) -> Tensor:
    """Return x / √mean(x²), and 0 for the zero vector."""
    return _divide_by_root(x, x.square().mean(-1, keepdim=True))


def _divide_by_root(x: Tensor, square: Tensor) -> Tensor:
    """Return x / √square, and 0 where `square` is 0."""
    zero = square == 0
    return x * torch.rsqrt(square.masked_fill(zero, 1)).masked_fill(zero, 0)


FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "lt": lambda a, b: (a < b).to(torch.result_type(a, b)),
    "le": lambda a, b: (a <= b).to(torch.result_type(a, b)),
    "eq": lambda a, b: (a == b).to(torch.result_type(a, b)),
    "pow": torch.pow,
    "abs": torch.abs,
    "real": lambda x: torch.real(x) if x.is_complex() else x,
    "imag": lambda x: torch.imag(x) if x.is_complex() else torch.zeros_like(x),
    "conj": torch.conj_physical,
    "min": _smaller,
    "max": _larger,
    "clamp": lambda x, low, high: _smaller(_larger(x, low), high),
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "log": torch.log,
    "log2": torch.log2,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "relu": torch.relu,
    "elu": F.elu,
    "silu": F.silu,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "logaddexp": torch.logaddexp,
    "sign": torch.sign,
    "if_at_least": lambda a, b, then, otherwise: torch.where(a >= b, then, otherwise),
    "normalised": _normalised,
    "rms": _rms,
}
"""The function for each operation name of `ir.Apply`."""
