"""Reductions that depend on one integer variable, computed once per value of the variable and looked up.

A reduction inside a loop sees the values of its variable once for every combination of the loops around it, although
it may depend on few of them: `mean(f(x) for x in j - 3 .. j + 4)` asks for each `f(x)` seven times, and another loop
over `j` asks for all of them again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnc.compiler import ir
from attnc.compiler.ir.rewrite import renamed
from attnc.compiler.ir.value_nodes import rank, reads
from attnc.compiler.lowering.specialise import CallSizes
from attnc.runtime.process.device_constants import on_device
from attnc.runtime.values.pair_blocks import NO_LOOPS, Int64, Operands, PairMask
from attnc.runtime.values.quantity_shapes import append_tensor_dims, map_tensors
from attnc.runtime.values.scaled import Quantity, ScaledTensor
from attnc.spec.errors import EvaluationError

if TYPE_CHECKING:
    from torch import Tensor

    from attnc.runtime.values.block_values import BlockValues

REPEATS = 2
"""Minimum number of pairs per value of the variable for which a table is made."""

_VARIABLE = ir.intern(ir.Var("a value in a table", 0))


@dataclass(frozen=True)
class ReductionTable:
    """The results of one reduction (values, heads or 1, 1, 1[, width]) for sorted values of its variable.

    `source`: the tensors and sizes that the results come from; a table serves all blocks that read the same ones.
    """

    numbers: Int64
    results: Quantity
    source: _Source

    def holds(self, numbers: Int64) -> bool:
        """Check whether the table has all the numbers."""
        at = np.searchsorted(self.numbers, numbers)
        return bool((self.numbers[np.minimum(at, len(self.numbers) - 1)] == numbers).all())

    def read(self, numbers: Int64, active: PairMask, width: int) -> Quantity:
        """Return the results for the numbers (…, 1, rows, keys), 0 for inactive pairs; `width`: trailing dimensions."""
        places = np.searchsorted(self.numbers, numbers).clip(max=len(self.numbers) - 1)
        mantissa = self.results.mantissa if isinstance(self.results, ScaledTensor) else self.results
        index, mask = (on_device(x, mantissa.device) for x in (places.reshape(-1), active))
        inside = bool(active.all())
        loops, pairs = numbers.shape[:-3], numbers.shape[-2:]

        def entries(x: Tensor) -> Tensor:
            x = x.index_select(0, index).reshape(*loops, *pairs, x.shape[1], *x.shape[4:])
            x = x.movedim(len(loops) + 2, len(loops))
            if inside:
                return x
            return torch.where(append_tensor_dims(mask, width), x, torch.zeros((), dtype=x.dtype, device=x.device))

        return map_tensors(self.results, entries)


def tabulated(values: BlockValues, node: ir.ValueReduce) -> Quantity | None:
    """Return a reduction looked up in a table; None where a table saves nothing, or where it would hide a fault."""
    numbers = _numbers(values, node)
    if numbers is None:
        return None
    variable, arguments = numbers
    active = values.active(node)
    mask = np.broadcast_to(active.any(-3, keepdims=True), arguments.shape)
    needed = np.unique(arguments[mask])
    if not len(needed):
        return None
    function = renamed(node, variable, _VARIABLE)
    assert isinstance(function, ir.ValueReduce)
    tables, source = _shared_tables(values), _Source.of(values.operands, function)
    block, operands = values.block, values.operands
    how = operands.dtype, operands.exponents, operands.spaced, operands.looks_up, operands.entry_heads
    key = function, block.batch, block.heads, block.window, how
    table = None if tables is None else tables.get(key)
    if not (isinstance(table, ReductionTable) and table.source.is_same(source) and table.holds(needed)):
        if REPEATS * len(needed) > arguments.size:
            return None
        results = _results(values, function, needed)
        if results is None:
            return None
        table = ReductionTable(needed, results, source)
        if tables is not None:
            tables[key] = table
    return table.read(arguments, active & mask, rank(node))


def _numbers(values: BlockValues, node: ir.ValueReduce) -> tuple[ir.Var, Int64] | None:
    """Return the loop variable that a reduction depends on, with its values (…, 1, rows, keys); None for others."""
    of_row = any(isinstance(below, ir.VisibleReduce | ir.Ranking) for below in node.below)
    if not values.loops.depth or of_row or {"q", "k"} & reads(node):
        return None
    variables = values.loops.of(node)
    if len(variables) != 1:
        return None
    ((variable, numbers),) = variables.items()
    return (variable, numbers) if numbers.shape[-3] == 1 else None


def _results(values: BlockValues, function: ir.ValueReduce, numbers: Int64) -> Quantity | None:
    """Compute a function of the table's variable; None where that faults, so that the caller reports the pair."""
    block = values.block
    active = np.ones((len(numbers), 1, 1, 1), dtype=np.bool_)
    one_pair = replace(block, rows=block.rows[:1], keys=block.keys[:1], active=active, visible=None)
    loops = NO_LOOPS.inside(_VARIABLE, numbers.reshape(-1, 1, 1, 1))
    try:
        return values.on_block(one_pair).in_loop(loops, active).quantity(function)
    except EvaluationError:
        return None


def _shared_tables(values: BlockValues) -> dict[object, object] | None:
    """Return the tables that all blocks of a call share; None where results carry gradients of one block."""
    operands = values.operands
    tensors = (*operands.q, *operands.k, *operands.v, *operands.inputs.values())
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    return operands.tables


@dataclass(frozen=True, eq=False)
class _Source:
    """The sizes, the scale and the arrays of operands, as far as a function reads them."""

    sizes: CallSizes
    scale: float
    arrays: tuple[object, ...]

    @classmethod
    def of(cls, operands: Operands, function: ir.Value) -> _Source:
        """Return what a function reads of operands."""
        arrays: list[object] = []
        for below in function.below:
            if isinstance(below, ir.Vec):
                arrays += {"q": operands.q, "k": operands.k, "v": operands.v}[below.tensor]
            elif isinstance(below, ir.Element):
                arrays.append(operands.inputs[below.tensor.name])
            elif isinstance(below, ir.Lookup):
                arrays.append(operands.slices)
        return cls(operands.sizes, operands.scale, tuple(arrays))

    def is_same(self, other: _Source) -> bool:
        """Check whether two sources are equal, with identical arrays."""
        same_arrays = all(a is b for a, b in zip(self.arrays, other.arrays, strict=True))
        return same_arrays and self.sizes == other.sizes and self.scale == other.scale
