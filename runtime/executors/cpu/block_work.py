"""A block of whole rows as a unit of work: its operands, its gradients, and the computation in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import is_own, values_of
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.executors.cpu.planned_call import operands_of
from attnc.runtime.executors.cpu.row_blocks import RowBlock
from attnc.runtime.values.attending import attend as attend_block
from attnc.runtime.values.attending import widened
from attnc.runtime.values.block_values import BlockValues


@dataclass(frozen=True)
class BlockOperands:
    """The operands of a block: vectors of its rows and keys, tensors of its batch entry, floating-point inputs.

    `own`: q (heads, rows, 1, dk), k (heads, 1, keys, dk) and v (heads, 1, keys, dv).
    """

    own: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    inputs: Sequence[Tensor]


class BlockResults(NamedTuple):
    """Results by row: out, and the LSE as `lse + shift`; lse is None without a softmax, and shift None for 0.

    A shift is close to the row's scores if these are large, so that differences from the LSE keep their digits.
    """

    out: Tensor
    lse: Tensor | None
    shift: Tensor | None = None


class RowData(NamedTuple):
    """Row data of a backward: the gradients of out and LSE, and the results, None where the work needs none."""

    grad_out: Tensor | None
    grad_lse: Tensor | None
    out: Tensor | None = None
    lse: Tensor | None = None
    shift: Tensor | None = None

    def at(self, *index: int | slice | Tensor) -> RowData:
        """Return the data of some rows."""
        return RowData(*(None if x is None else x[index] for x in self))

    def without(self, rows: Tensor) -> RowData:
        """Return the row data with zeros, and an LSE of +inf, in the given rows: they contribute nothing."""
        data = (None if x is None else torch.where(append_axes(rows, x.ndim), 0, x) for x in self)
        cleared = RowData(*data)
        return cleared if self.lse is None else cleared._replace(lse=torch.where(rows, torch.inf, self.lse))


def append_axes(rows: Tensor, ndim: int) -> Tensor:
    """Return a tensor by row with axes of size one behind, `ndim` in all."""
    return rows.reshape(*rows.shape, *[1] * (ndim - rows.ndim))


Gradients = Sequence["Tensor | None"]
"""Gradients of a block's own vectors, of tensors read elsewhere, and of the inputs that require them; or none."""


class BlockWork(Protocol):
    """The computation of one attention by blocks of rows."""

    @property
    def node(self) -> ir.Attend:
        """The attention."""

    @property
    def least_rows(self) -> int:
        """The argument of `row_blocks`."""

    @property
    def keeps_results(self) -> bool:
        """Whether the backward needs the results of the forward."""

    def vectors(self, x: Tensor) -> Tensor:
        """Return q, k or v in the dtype in which blocks take them."""

    def computed(self, block: RowBlock, leaves: BlockOperands) -> BlockResults:
        """Compute the results of a block, for each of its heads and rows."""

    def recomputed(self, block: RowBlock, leaves: BlockOperands) -> BlockResults:
        """Compute the results of a part of a block in which vectors, scores or inputs are not finite."""

    def prepared(self, rows: RowData) -> RowData:
        """Return the data of all rows as `gradients` takes it."""

    def gradients(self, block: RowBlock, leaves: BlockOperands, rows: RowData) -> Gradients:
        """Compute the gradients of a block."""


@dataclass(frozen=True)
class InTorch:
    """The work of any attention, in torch and in the dtype of values; autograd derives the backward."""

    relations: Relations
    scale: float
    dtype: torch.dtype
    least_rows: int = 16
    keeps_results: bool = False

    @property
    def node(self) -> ir.Attend:
        """The attention."""
        return self.relations.pattern.attend

    def vectors(self, x: Tensor) -> Tensor:
        """Return q, k or v in the dtype of values."""
        return x.to(self.dtype)

    def computed(self, block: RowBlock, leaves: BlockOperands) -> BlockResults:
        """Compute the results of a block, differentiable in its operands."""
        q, k, v = ([leaves.whole[name]] * (block.batch + 1) for name in ("q", "k", "v"))
        operands = operands_of(self.relations, self.scale, (q, k, v), leaves.inputs)
        pairs = block.pairs(0 if operands.spaced else block.window.key, block.mask[None])
        out, lse = attend_block(BlockValues(operands, pairs, leaves.own), self.node)
        size = len(block.heads), len(block.rows)
        return BlockResults(widened(out, *size, self.node), None if lse is None else lse.expand(size))

    recomputed = computed

    def prepared(self, rows: RowData) -> RowData:
        """Return the row data."""
        return rows

    def gradients(self, block: RowBlock, leaves: BlockOperands, rows: RowData) -> Gradients:
        """Compute the gradients by recording the block again; () if it depends on no operand."""
        elsewhere = read_elsewhere(self.node)
        with torch.enable_grad():
            own = {name: x.detach().requires_grad_() for name, x in leaves.own.items()}
            whole = {n: x.detach().requires_grad_() if n in elsewhere else x for n, x in leaves.whole.items()}
            recorded = self.computed(block, BlockOperands(own, whole, leaves.inputs))
        wanted = [*own.values(), *(whole[n] for n in elsewhere), *(x for x in leaves.inputs if x.requires_grad)]
        results, grads = [], []
        for result, grad in zip(recorded[:2], rows[:2], strict=True):
            if result is not None and grad is not None and result.requires_grad:
                results.append(result)
                grads.append(grad.to(result.dtype))
        if not results:
            return ()
        seen = torch.from_numpy(block.mask.any(axis=1)).to(recorded.out.device)
        grads = [torch.where(seen.reshape(-1, *[1] * (g.ndim - 2)), g, 0) for g in grads]
        return torch.autograd.grad(results, wanted, grads, allow_unused=True)


def read_elsewhere(node: ir.Attend) -> list[str]:
    """Return the tensors that are read at positions other than the row's or key's own."""
    read = {b for root in values_of(node) for b in root.below if isinstance(b, ir.Vec)}
    spaced = node.keys is not None
    return [n for n in ("q", "k", "v") if any(b.tensor == n and (not is_own(b) or spaced) for b in read)]
