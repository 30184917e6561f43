"""One walk over the floating-point values of the IR, whatever they are values of: blocks of pairs, or tokens.

A value is a tensor with leading dimensions, which a subclass defines, followed by the axes of the IR value in their
order. A leading dimension that a value does not depend on has size 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import Axes, axes
from attnc.runtime.values.quantity_shapes import append_tensor_dims, map_tensors
from attnc.runtime.values.scaled import Quantity, plain
from attnc.spec.errors import EvaluationError


class ValueWalk(ABC):
    """Values by their kind of node. Subclasses read the leaves, and say which entries of leading dimensions count."""

    @property
    @abstractmethod
    def lead(self) -> int:
        """The number of leading dimensions."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The call's scale."""

    @abstractmethod
    def quantity(self, node: ir.Value) -> Quantity:
        """Return a value, computed when it is first read."""

    def of(self, node: ir.Value) -> Tensor:
        """Return a value as a tensor.

        Raises EvaluationError where an index or an exact subexpression faults for an entry that counts.
        """
        return plain(self.quantity(node))

    def compute(self, node: ir.Value) -> Quantity:  # noqa: C901  one case a node kind
        """Compute a value from its operands."""
        match node:
            case ir.Number(value=value):
                return self.constant(value)
            case ir.Scale():
                return self.constant(self.scale)
            case ir.Ratio():
                return self.ratio(node)
            case ir.Vec():
                return self.vector(node)
            case ir.Element():
                return self.element(node)
            case ir.Apply():
                return self._apply(node)
            case ir.Dot():
                return self._dot(node)
            case ir.FloatSelect():
                return self._select(node)
            case ir.ValueReduce():
                return self._reduce_range(node)
            case ir.VisibleReduce():
                return self._reduce_visible(node)
            case ir.Outer(left=left, right=right):
                return self.of(left)[..., :, None] * self.of(right)[..., None, :]
            case ir.Pick(vector=vector, index=index):
                return self.picked(self.of(vector), index)
            case ir.VectorPart():
                return self._part(node)
            case ir.Eye(size=size):
                width, like = int(self.integers(size).flat[0]), self.constant(0.0)
                eye = torch.eye(width, dtype=like.dtype, device=like.device)
                return eye.reshape((1,) * self.lead + (width, width))
            case ir.Solve():
                return self._solve(node)
            case _:
                return self._compute_state(node)

    # --- leaves ---

    @abstractmethod
    def constant(self, value: float) -> Tensor:
        """Return a number with leading dimensions of size one."""

    @abstractmethod
    def ratio(self, node: ir.Ratio) -> Tensor:
        """Return an exact ratio. Raises EvaluationError where a divisor is zero."""

    @abstractmethod
    def vector(self, node: ir.Vec) -> Tensor:
        """Return the vectors of q, k or v."""

    @abstractmethod
    def element(self, node: ir.Element) -> Tensor:
        """Return the entries of a real input. Raises EvaluationError for an index that is out of range."""

    @abstractmethod
    def integers(self, node: ir.Index) -> NDArray[np.int64]:
        """Return an integer, or a condition as 0 and 1, over the leading dimensions."""

    @abstractmethod
    def tensor(self, array: NDArray[Any]) -> Tensor:
        """Return an array as a tensor on the device of the call."""

    def active(self, node: ir.Value | ir.Index) -> NDArray[np.bool_]:
        """Return the entries of the leading dimensions that count: all."""
        return np.ones((1,) * self.lead, dtype=np.bool_)

    # --- node kinds that depend on the leading dimensions ---

    @abstractmethod
    def _apply(self, node: ir.Apply) -> Quantity: ...

    @abstractmethod
    def _dot(self, node: ir.Dot) -> Tensor: ...

    @abstractmethod
    def _select(self, node: ir.FloatSelect) -> Quantity: ...

    @abstractmethod
    def _reduce_range(self, node: ir.ValueReduce) -> Quantity: ...

    @abstractmethod
    def _reduce_visible(self, node: ir.VisibleReduce) -> Quantity: ...

    @abstractmethod
    def _solve_by_steps(self, matrix: Tensor, vector: Tensor, steps: int) -> Tensor: ...

    def _compute_state(self, node: ir.Contract | ir.Diagonal | ir.StateAt | ir.Ranking) -> Quantity:
        """Compute a value of a node kind that only recurrences have."""
        raise AssertionError(f"{type(node).__name__} in a pattern")

    # --- vectors and matrices ---

    def aligned(self, node: ir.Value, wanted: Axes) -> Quantity:
        """Return a value reshaped to the axes `wanted`: size 1 for each axis that it lacks."""
        own = axes(node)
        return map_tensors(self.quantity(node), lambda x: aligned(x, own, wanted, self.lead))

    def picked(self, vector: Tensor, index: ir.Index) -> Tensor:
        """Return the entries of the first axis after the leading dimensions at an index.

        Raises EvaluationError for an index that is out of range.
        """
        at, size, width = self.integers(index), vector.shape[self.lead], vector.ndim - self.lead
        outside = self.active(index) & ((at < 0) | (at >= size))
        if outside.any():
            number = int(np.broadcast_to(at, outside.shape)[outside][0])
            message = f"index {number} is out of range for a vector of {size} entries"
            raise EvaluationError("A902", message, None, "test the index first: `… if i < n else …`")
        if at.size == 1 and size:
            return vector.select(self.lead, min(max(int(at.flat[0]), 0), size - 1))
        places = self.tensor(np.clip(at, 0, size - 1))
        entries_last = vector.movedim(self.lead, -1)
        shape: tuple[int, ...] = entries_last.shape[: self.lead]
        moved = [i for i in range(self.lead) if places.shape[i] > 1]
        if len(moved) == 1 and shape[moved[0]] == 1:  # one leading dimension runs over the entries
            return entries_last.index_select(-1, places.reshape(-1)).transpose(-1, moved[0]).squeeze(-1)
        shape = np.broadcast_shapes(shape, places.shape)
        places = append_tensor_dims(places, width).expand(*shape, *entries_last.shape[self.lead : -1], 1)
        return entries_last.expand(*shape, *entries_last.shape[self.lead :]).gather(-1, places).squeeze(-1)

    def _part(self, node: ir.VectorPart) -> Tensor:
        vector = self.of(node.vector)
        if vector.shape[-1] % node.of:
            message = f"a vector of {vector.shape[-1]} entries cannot be split into {node.of} equal parts"
            raise EvaluationError("A904", message, None, f"use a size that is a multiple of {node.of}")
        size = vector.shape[-1] // node.of
        return vector[..., node.number * size : (node.number + 1) * size]

    def _solve(self, node: ir.Solve) -> Tensor:
        matrix, vector = self.of(node.matrix), self.of(node.vector)
        active = self.active(node)
        if not active.all():
            eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
            matrix = torch.where(append_tensor_dims(self.tensor(active), 2), matrix, eye)
        shape = np.broadcast_shapes(matrix.shape[:-2], vector.shape[:-1])
        vector = vector.expand(*shape, vector.shape[-1])
        if node.steps is not None:
            return self._solve_by_steps(matrix, vector, node.steps)
        solved: Tensor
        solved, singular = torch.linalg.solve_ex(matrix.expand(*shape, *matrix.shape[-2:]), vector[..., None])
        if singular.any():
            help_ = "add a positive number to its diagonal: `… + 0.01 * eye(dk)`"
            raise EvaluationError("A901", "the matrix of `solve` is singular", None, help_)
        return solved[..., 0]


def aligned(x: Tensor, own: Axes, wanted: Axes, lead: int) -> Tensor:
    """Return a value with axes `own`, reshaped to the axes `wanted`: size 1 for each axis that it lacks."""
    if len(own) == len(wanted):
        return x
    remaining = list(own)
    for i, axis in enumerate(wanted):
        if remaining and remaining[0] == axis:
            remaining.pop(0)
        else:
            x = x.unsqueeze(lead + i)
    return x
