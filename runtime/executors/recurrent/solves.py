"""Conjugate gradients; the gradient of rows that converged is another solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from attnc.runtime.executors.cpu.autograd import FirstOrder
from attnc.runtime.values.sums import conjugate_gradients, descend

NEAR = 64
"""Maximum residual of a converged row, in units of its rounding."""


def solve_by_steps(matrix: Tensor, vector: Tensor, steps: int) -> Tensor:
    """Solve A x = b for symmetric A (…, d, d) and b (…, d) by `steps` steps of conjugate gradients from 0.

    A row that converged has the gradient of the exact solution, db = A⁻¹ dx and dA = -db xᵀ (von Oswald et al. 2025,
    "MesaNet"): a gradient through its last steps would consist of quotients of rounding errors. A row that did not
    converge has the gradient through its steps. Differentiable as often as torch can.
    """
    if not torch.is_grad_enabled() or not (matrix.requires_grad or vector.requires_grad):
        return conjugate_gradients(matrix, vector, steps)
    result = cast("Tensor", _Converged.apply(matrix, vector, steps))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        residual = vector - (matrix @ result[..., None])[..., 0]
        tolerance = NEAR * torch.finfo(residual.dtype).eps
        size = torch.linalg.vector_norm(vector, dim=-1)
        size = size + torch.linalg.matrix_norm(matrix) * torch.linalg.vector_norm(result, dim=-1)
        converged = torch.linalg.vector_norm(residual, dim=-1) <= tolerance * size
    if converged.all():
        return result
    return torch.where(converged[..., None], result, conjugate_gradients(matrix, vector, steps))


def solve_by_reads(times: Callable[[Tensor], Tensor], vector: Tensor, steps: int) -> Tensor:
    """Solve A x = b for a symmetric A that is given as a function `times`, x (…, d) → A x (…, d).

    The gradient of rows that converged is another solve; if all rows converged, `times` is differentiated only once.
    """
    with torch.no_grad():
        scale = torch.zeros_like(vector[..., 0])

        def measured_times(x: Tensor) -> Tensor:
            product = times(x)
            length = torch.linalg.vector_norm(x, dim=-1)
            ratio = torch.linalg.vector_norm(product, dim=-1) / torch.where(length == 0, 1, length)
            torch.maximum(scale, ratio, out=scale)
            return product

        result = descend(measured_times, vector, steps)
    if not torch.is_grad_enabled():
        return result
    residual = vector - times(result)
    if not residual.requires_grad:
        return result
    with torch.no_grad():
        size = torch.linalg.vector_norm(vector, dim=-1) + scale * torch.linalg.vector_norm(result, dim=-1)
        converged = torch.linalg.vector_norm(residual, dim=-1) <= NEAR * torch.finfo(residual.dtype).eps * size
    exact = result + cast("Tensor", _Remainder.apply(residual, times, steps))  # type: ignore[no-untyped-call]
    if converged.all():
        return exact
    return torch.where(converged[..., None], exact, descend(times, vector, steps))


class _Remainder(FirstOrder):
    """A⁻¹ times the residual: its value counts as 0, its gradient is that of the exact solution."""

    @staticmethod
    def forward(residual: Tensor, times: Callable[[Tensor], Tensor], steps: int) -> Tensor:
        return torch.zeros_like(residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.times, ctx.steps = inputs

    @staticmethod
    def backward(ctx: Any, d_solution: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return descend(ctx.times, d_solution, ctx.steps), None, None


class _Converged(torch.autograd.Function):
    """Conjugate gradients with the gradient of the exact solution, right for rows that converged."""

    @staticmethod
    def forward(matrix: Tensor, vector: Tensor, steps: int) -> Tensor:
        return conjugate_gradients(matrix, vector, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.steps = inputs[2]

    @staticmethod
    def backward(ctx: Any, d_solution: Tensor) -> tuple[Tensor, Tensor, None]:
        matrix, solution = ctx.saved_tensors
        d_vector = solve_by_steps(matrix, d_solution, ctx.steps)
        return -d_vector[..., :, None] * solution[..., None, :], d_vector, None
