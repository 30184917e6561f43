"""Conjugate gradients whose gradient is another solve, where they arrived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from attnc.runtime.cpu.autograd import FirstOrder
from attnc.runtime.sums import conjugate_gradients, descend

NEAR = 64
"""Maximum residual of a converged row, in units of its rounding."""


def solve_by_steps(matrix: Tensor, vector: Tensor, steps: int) -> Tensor:
    """`conjugate_gradients`: x of A x = b for symmetric A (…, d, d) and b (…, d), so many steps from 0.

    A row that arrived has the gradient of the exact solution, db = A⁻¹ dx and dA = -db xᵀ (von Oswald et al. 2025,
    "MesaNet"): through its steps it would be made of quotients of what rounding left. One that did not, that of its
    steps. Differentiable as often as torch can.
    """
    if not torch.is_grad_enabled() or not (matrix.requires_grad or vector.requires_grad):
        return conjugate_gradients(matrix, vector, steps)
    result = cast("Tensor", _Arrived.apply(matrix, vector, steps))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        left = vector - (matrix @ result[..., None])[..., 0]
        near = NEAR * torch.finfo(left.dtype).eps
        size = torch.linalg.vector_norm(vector, dim=-1)
        size = size + torch.linalg.matrix_norm(matrix) * torch.linalg.vector_norm(result, dim=-1)
        arrived = torch.linalg.vector_norm(left, dim=-1) <= near * size
    if arrived.all():
        return result
    return torch.where(arrived[..., None], result, conjugate_gradients(matrix, vector, steps))


def solve_by_reads(times: Callable[[Tensor], Tensor], vector: Tensor, steps: int) -> Tensor:
    """Solve with a symmetric A that is given as a function of vectors, `times` (…, d) → (…, d).

    Differentiable once more than `times` is by what it calls: where all rows arrived, `times` is differentiated once.
    """
    with torch.no_grad():
        scale = torch.zeros_like(vector[..., 0])

        def watched(x: Tensor) -> Tensor:
            made = times(x)
            length = torch.linalg.vector_norm(x, dim=-1)
            ratio = torch.linalg.vector_norm(made, dim=-1) / torch.where(length == 0, 1, length)
            torch.maximum(scale, ratio, out=scale)
            return made

        result = descend(watched, vector, steps)
    if not torch.is_grad_enabled():
        return result
    left = vector - times(result)
    if not left.requires_grad:
        return result
    with torch.no_grad():
        size = torch.linalg.vector_norm(vector, dim=-1) + scale * torch.linalg.vector_norm(result, dim=-1)
        arrived = torch.linalg.vector_norm(left, dim=-1) <= NEAR * torch.finfo(left.dtype).eps * size
    exact = result + cast("Tensor", _Rest.apply(left, times, steps))  # type: ignore[no-untyped-call]
    if arrived.all():
        return exact
    return torch.where(arrived[..., None], exact, descend(times, vector, steps))


class _Rest(FirstOrder):
    """A⁻¹ of what is left, which counts as 0, and has the gradient of the solution."""

    @staticmethod
    def forward(left: Tensor, times: Callable[[Tensor], Tensor], steps: int) -> Tensor:
        return torch.zeros_like(left)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.times, ctx.steps = inputs

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return descend(ctx.times, d_found, ctx.steps), None, None


class _Arrived(torch.autograd.Function):
    """Rows that arrived."""

    @staticmethod
    def forward(matrix: Tensor, vector: Tensor, steps: int) -> Tensor:
        return conjugate_gradients(matrix, vector, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.steps = inputs[2]

    @staticmethod
    def backward(ctx: Any, d_found: Tensor) -> tuple[Tensor, Tensor, None]:
        matrix, found = ctx.saved_tensors
        d_vector = solve_by_steps(matrix, d_found, ctx.steps)
        return -d_vector[..., :, None] * found[..., None, :], d_vector, None


__all__ = ["solve_by_reads", "solve_by_steps"]
