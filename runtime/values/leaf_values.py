"""Leaves of floating-point values over one block: vectors of q, k and v, entries of real inputs, exact ratios."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.array_evaluator import WORD
from attnc.compiler.ir.value_nodes import is_own
from attnc.runtime.process.device_constants import on_device
from attnc.runtime.values.exact_block_values import ExactBlockValues
from attnc.runtime.values.pair_blocks import (
    Int64,
    Loops,
    Operands,
    PairBlock,
)
from attnc.runtime.values.quantity_shapes import append_tensor_dims
from attnc.runtime.values.sums import gathered, taken
from attnc.runtime.values.table_products import TableReads
from attnc.spec.errors import EvaluationError


class LeafValues(ExactBlockValues):
    """Values that are read from tensors, over the pair dimensions of one block.

    `vectors`: q, k or v of the block's rows, (heads, rows, 1, dk), and keys, where the caller has gathered them.
    """

    def __init__(
        self, operands: Operands, block: PairBlock, loops: Loops, vectors: Mapping[str, Tensor] | None
    ) -> None:
        super().__init__(operands, block, loops)
        self.vectors = vectors or {}

    def ratio(self, node: ir.Ratio) -> Tensor:
        """Return an exact ratio. Raises EvaluationError for an active pair whose divisor is zero."""
        num = self.floats(node.num)
        if isinstance(node.den, ir.Const) and 0 < node.den.value < WORD:
            quotient = np.where(self.active(node.num), num, 1) / float(node.den.value)
            return on_device(quotient, self.operands.device, self.operands.dtype)
        den = self.floats(node.den)
        active = self.active(node.num) & self.active(node.den)
        if (self.active(node) & (den == 0)).any():
            raise EvaluationError("A901", "division by zero", None, "test the divisor first: `… if n != 0 else …`")
        quotient = np.where(active, num, 1) / np.where(active & (den != 0), den, 1)
        return on_device(quotient, self.operands.device, self.operands.dtype)

    def vector(self, node: ir.Vec) -> Tensor:
        """Return the vectors of q, k or v that the pairs read."""
        block, operands = self.block, self.operands
        if not is_own(node) or (operands.spaced and node.tensor != "q"):
            return self._vector_at(node)
        loops = (None,) * self.loops.depth
        if node.tensor in self.vectors:
            return self.vectors[node.tensor][loops]
        heads = np.asarray(block.heads, dtype=np.int64)
        if node.tensor == "q":
            rows = taken(operands.q[block.batch], heads, block.rows + block.window.row)
            return rows.to(operands.dtype)[:, :, None][loops]
        tensor = operands.k if node.tensor == "k" else operands.v
        keys = taken(tensor[block.batch], heads // operands.group, block.keys + block.window.key)
        return keys.to(operands.dtype)[:, None][loops]

    def _vector_at(self, node: ir.Vec) -> Tensor:
        """Return the vectors at computed positions and heads; zeros at the position OUTSIDE.

        Raises EvaluationError for an active pair whose position has no token.
        """
        operands, window = self.operands, self.block.window
        tensor = {"q": operands.q, "k": operands.k, "v": operands.v}[node.tensor][self.block.batch]
        at, active = self.integers(node.at), self.active(node.at)
        heads = self.integers(node.head)
        if operands.entry_heads is not None:
            block_heads = np.array(self.block.heads)[:, None, None]
            heads = heads + (block_heads - block_heads % operands.entry_heads)
        if node.tensor == "q":
            low, first, count = window.shift, window.row - window.shift, window.n_q
        else:
            low, first, count = 0, window.key, operands.k[0].shape[1] if operands.spaced else window.n_k
            heads = heads // operands.group
        reads_zero = active & (at == ir.OUTSIDE)
        outside = active & ~reads_zero & ((at < low) | (at >= low + count))
        if outside.any():
            position = int(np.broadcast_to(at, outside.shape)[outside][0])
            message = f"`{node.tensor}` is read at position {position}, which has no token"
            raise EvaluationError("A902", message, None, "test the position first: `… if 0 <= i < n else …`")
        index = np.clip(at + first, 0, max(tensor.shape[1] - 1, 0))
        vectors = gathered(tensor.to(operands.dtype), [self.tensor(heads), self.tensor(index)])
        if not reads_zero.any():
            return vectors
        zero = torch.zeros((), dtype=vectors.dtype, device=vectors.device)
        return torch.where(self.tensor(reads_zero)[..., None], zero, vectors)

    def element(self, node: ir.Element) -> Tensor:
        """Return the entries of a real input that the pairs read, with 1 for inactive pairs."""
        tensor = self.operands.inputs[node.tensor.name].to(self.operands.dtype)
        if not node.indices:
            return tensor[(None,) * self.pair_dims]
        table_reads = self.table_reads(node)
        value = gathered(tensor, [self.tensor(index) for index in table_reads.indices])
        if table_reads.active.all():
            return value
        active = append_tensor_dims(self.tensor(table_reads.active), value.ndim - self.pair_dims)
        return torch.where(active, value, torch.ones((), dtype=value.dtype, device=value.device))

    def table_reads(self, node: ir.Element) -> TableReads:
        """Return the indices at which pairs read a real input; an inactive pair has any index in range.

        Raises EvaluationError for an active pair whose index is out of range.
        """
        shape = self.operands.inputs[node.tensor.name].shape
        indices: list[Int64] = []
        active = np.ones((1,) * self.pair_dims, dtype=np.bool_)
        for axis, (index, dim) in enumerate(zip(node.indices, node.tensor.dims, strict=False)):
            low, size, offset = self._index_range(dim, shape[axis])
            index_active, values = self.active(index), self.integers(index)
            outside = index_active & ((values < low) | (values >= low + size))
            if outside.any() and dim != "batch":
                name = f"the `{dim}` dimension" if isinstance(dim, str) else "that dimension"
                value = int(np.broadcast_to(values, outside.shape)[outside][0])
                message = f"`{node.tensor.name}` is read at {value}; {name} has {low} to {low + size - 1}"
                span = self.operands.origins.get(index)
                raise EvaluationError("A902", message, span, "test the index first: `… if 0 <= i < n else …`")
            at = np.zeros_like(values) if dim == "batch" and shape[axis] == 1 else values + offset
            indices.append(np.clip(at, 0, max(shape[axis] - 1, 0)))
            active = active & index_active
        return TableReads(indices, active)

    def _index_range(self, dim: str | int, size: int) -> tuple[int, int, int]:
        """Return the first index of a dimension, its size, and the offset from an index to the tensor's entry."""
        window = self.block.window
        match dim:
            case "token" | "key":
                return (0, size, 0) if self.operands.spaced else (0, window.n_k, window.key)
            case "query":
                return window.shift, window.n_q, window.row - window.shift
            case _:
                return 0, size, 0
