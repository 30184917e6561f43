"""Floating-point values of the IR as torch tensors over blocks of pairs: scores, weights and attended values.

Everything is differentiable in q, k, v and the real inputs. Entries of inactive pairs are finite constants, so that
they cannot make a gradient NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import axes, rank
from attnc.runtime.values import scaled
from attnc.runtime.values.functions import FUNCTIONS
from attnc.runtime.values.leaf_values import LeafValues
from attnc.runtime.values.masked_reductions import reduce_where
from attnc.runtime.values.pair_blocks import (
    NO_LOOPS,
    Loops,
    Operands,
    PairBlock,
    PairMask,
)
from attnc.runtime.values.quantity_shapes import (
    append_dims,
    append_tensor_dims,
    map_tensors,
    prepend_dims,
)
from attnc.runtime.values.range_reductions import reduce_range
from attnc.runtime.values.scaled import Quantity, ScaledTensor, plain
from attnc.runtime.values.sums import conjugate_gradients
from attnc.runtime.values.table_products import looked_up, product
from attnc.runtime.values.value_walk import ValueWalk
from attnc.spec.errors import EvaluationError

UNBOUNDED = {"div": 1, "share": 1, "log": 0, "log2": 0, "sqrt": 0, "pow": 0, "normalised": 0, "rms": 0}
"""Functions whose derivative is not finite everywhere, and the index of the operand that decides where."""


class BlockValues(LeafValues, ValueWalk):
    """Values over one block: tensors (…, heads or 1, rows or 1, keys or 1), with trailing dimensions for vectors.

    Each loop around a value adds one leading dimension.
    """

    def __init__(
        self,
        operands: Operands,
        block: PairBlock,
        vectors: Mapping[str, Tensor] | None = None,
        loops: Loops = NO_LOOPS,
        outer: BlockValues | None = None,
        precomputed: Mapping[ir.Value, Tensor] | None = None,
    ) -> None:
        """`vectors`: q, k or v of the block's rows, (heads, rows, 1, dk), and keys, where they are gathered already.

        `outer`: values over more pairs or fewer loops, whose results are reused. `precomputed`: values over all pairs
        of the block that the caller has computed already.
        """
        super().__init__(operands, block, loops, vectors)
        self._outer = outer
        self._computed: dict[ir.Value, Quantity] = dict(precomputed or {})

    def over(self, active: PairMask) -> BlockValues:
        """Return the same values over fewer active pairs."""
        return self.in_loop(self.loops, active)

    def in_loop(self, loops: Loops, active: PairMask) -> BlockValues:
        """Return the same values inside `loops`, over the active pairs given."""
        return BlockValues(self.operands, replace(self.block, active=active), self.vectors, loops, self)

    def on_block(
        self, block: PairBlock, operands: Operands | None = None, vectors: Mapping[str, Tensor] | None = None
    ) -> BlockValues:
        """Return values over another block, without loops and without results to reuse."""
        return BlockValues(operands or self.operands, block, vectors)

    @property
    def lead(self) -> int:
        """The number of leading dimensions: the pair dimensions."""
        return self.pair_dims

    @property
    def scale(self) -> float:
        """The call's scale."""
        return self.operands.scale

    def quantity(self, node: ir.Value) -> Quantity:
        """Return a value as a tensor, or as mantissa and shift."""
        value = self._computed.get(node)
        if value is None:
            value = self._computed_outside(node)
            value = self._computed[node] = self.compute(node) if value is None else self._narrowed(node, value)
        return value

    def _computed_outside(self, node: ir.Value) -> Quantity | None:
        """Return the result that an outer object has computed over more pairs, if any."""
        values = self._outer
        while values is not None and values.loops is self.loops:
            if node in values._computed:
                return values._computed[node]
            values = values._outer
        return None

    def _narrowed(self, node: ir.Value, value: Quantity) -> Quantity:
        """Return the value with 1 for pairs that are no longer active: no gradient flows through them."""
        if not (value.mantissa if isinstance(value, ScaledTensor) else value).requires_grad:
            return value
        active = self.active(node)
        if active.all():
            return value
        mask = append_tensor_dims(self.tensor(active), rank(node))
        return map_tensors(value, lambda x: torch.where(mask, x, torch.ones((), dtype=x.dtype, device=x.device)))

    def where(self, condition: ir.Index) -> tuple[BlockValues, Tensor]:
        """Return the same values over the active pairs for which a condition holds, and the mask of the condition."""
        holds = self.holds(condition)
        if isinstance(condition, ir.Truth) and condition.value:
            return self, self.tensor(holds)  # reuses the results computed so far
        return self.over(self.over_loops(self.block.active) & holds), self.tensor(holds)

    def looped(self, variable: ir.Var, low: int, high: int) -> BlockValues:
        """Return the same values inside a loop of `variable` from `low` to `high` - 1."""
        steps = np.arange(low, high).reshape(-1, *[1] * self.pair_dims)
        return BlockValues(self.operands, self.block, self.vectors, self.loops.inside(variable, steps), self)

    def logit(self, node: ir.Value) -> Tensor:
        """Return the logit (heads or 1, rows) of an extra logit, or the log-sum-exp of a vector of extra logits."""
        value = self.of(node)
        return (value if value.ndim == 3 else torch.logsumexp(value, -1))[..., 0]

    def weighted(self, weights: Quantity, node: ir.Value) -> Quantity:
        """Return Σ weights · value over the keys: (…, heads or 1, rows or 1, 1[, width])."""
        value = self.quantity(node)
        extra = rank(node)
        factors = [append_dims(weights, extra), value]
        return scaled.contracted(factors, append_tensor_dims(self.visible(), extra), -1 - extra, extra)

    def visible(self) -> Tensor:
        """Return the visible pairs: (…, heads or 1, rows, keys)."""
        return self.tensor(self.over_loops(self._visible()))

    def _visible(self) -> PairMask:
        assert self.block.visible is not None
        return self.block.visible

    # --- node kinds that depend on pairs ---

    def _solve_by_steps(self, matrix: Tensor, vector: Tensor, steps: int) -> Tensor:
        return conjugate_gradients(matrix, vector, steps)

    def _dot(self, node: ir.Dot) -> Tensor:
        for table, vector in ((node.left, node.right), (node.right, node.left)):
            if self.operands.looks_up and isinstance(table, ir.Element) and self._meets_several(table, vector):
                tensor = self.operands.inputs[table.tensor.name].to(self.operands.dtype)
                products = looked_up(tensor, self.table_reads(table), self.of(vector))
                if products is not None:
                    return products
        return product(self.of(node.left), self.of(node.right))

    def _meets_several(self, table: ir.Element, vector: ir.Value) -> bool:
        """Check whether one vector is multiplied with several vectors of a table."""
        return any(a and not b for a, b in zip(self.axes(table), self.axes(vector), strict=True))

    # --- functions ---

    def _apply(self, node: ir.Apply) -> Quantity:
        result_axes = axes(node)
        operands = [self.aligned(operand, result_axes) for operand in node.operands]
        if node.op in UNBOUNDED:
            operands = self._with_finite_derivative(node, operands, len(result_axes))
        unscaled = node.op in _EXPONENTIAL and not self.operands.exponents
        result = None if unscaled else _apply_scaled(node, operands)
        return FUNCTIONS[node.op](*map(plain, operands)) if result is None else result

    def _with_finite_derivative(self, node: ir.Apply, operands: list[Quantity], extra: int) -> list[Quantity]:
        """Return the operands with 1 for inactive pairs, where the derivative might not be finite."""
        active = self.active(node)
        if active.all():
            return operands
        mask = append_tensor_dims(self.tensor(active), extra)
        at = UNBOUNDED[node.op]
        one = torch.ones((), dtype=self.operands.dtype, device=mask.device)
        operand = map_tensors(operands[at], lambda x: torch.where(mask, x, one))
        return [*operands[:at], operand, *operands[at + 1 :]]

    def _select(self, node: ir.FloatSelect) -> Quantity:
        """Return a selection whose sides are each computed over the pairs that take them."""
        condition = self.holds(node.condition)
        active = self.over_loops(self.block.active)
        result_axes = axes(node)
        then, otherwise = (
            self.over(active & taken).aligned(side, result_axes)
            for taken, side in ((condition, node.then), (~condition, node.otherwise))
        )
        return scaled.chosen(append_tensor_dims(self.tensor(condition), len(result_axes)), then, otherwise)

    # --- reductions ---

    def _reduce_visible(self, node: ir.VisibleReduce) -> Quantity:
        """Reduce over the visible keys of each row, reusing a result computed outside of unrelated loops."""
        outer = self._outer
        if outer is not None and outer.loops is self.loops:
            try:
                return outer.quantity(node)
            except EvaluationError:  # may be raised by a row that is inactive here
                return self._reduce_visible_here(node)
        if outer is not None and not self.loops.of(node):
            return prepend_dims(outer.quantity(node), 1)
        return self._reduce_visible_here(node)

    def _reduce_visible_here(self, node: ir.VisibleReduce) -> Quantity:
        """Reduce over the visible keys of the active rows."""
        visible = self.over_loops(self._visible()) & self.over_loops(self.block.active).any(-1, keepdims=True)
        values = self.over(visible)
        if not (isinstance(node.condition, ir.Truth) and node.condition.value):
            visible = visible & values.holds(node.condition)
            values = self.over(visible)
        result = reduce_where(values, node.op, node.body, visible, -1)
        return result if node.op == "sum" else self._zero_where_inactive(node, result)

    def _reduce_range(self, node: ir.ValueReduce) -> Quantity:
        result = reduce_range(self, node)
        return result if node.op == "sum" else self._zero_where_inactive(node, result)

    def _zero_where_inactive(self, node: ir.Value, value: Quantity) -> Quantity:
        """Return an extreme with 0 for inactive pairs, where it may be the extreme of no terms."""
        active = self.active(node)
        if active.all():
            return value
        mask = append_tensor_dims(self.tensor(active), rank(node))
        extreme = plain(value)
        return torch.where(mask, extreme, torch.zeros((), dtype=extreme.dtype, device=mask.device))


_EXPONENTIAL = ("exp", "softplus")
"""Functions whose values get exponents."""


def _apply_scaled(node: ir.Apply, operands: Sequence[Quantity]) -> Quantity | None:
    """Apply an operation that works on mantissa and shift; None for all others."""
    match node.op, operands:
        case "exp", (x,):
            return scaled.exp(plain(x))
        case "softplus", (x,):
            own = plain(x)
            return scaled.softplus(FUNCTIONS["softplus"](own), own)
        case "mul", (a, b):
            return scaled.multiplied(a, b)
        case "chain", (a, b):
            return scaled.chained(a, b)
        case "div" | "share", (a, b):
            return scaled.divided(a, b, safe=node.op == "share")
        case "add", (a, b):
            return scaled.added(a, b)
        case "sub", (a, b):
            return scaled.added(a, scaled.negative(b) if isinstance(b, ScaledTensor) else -b)
        case "neg", (ScaledTensor() as x,):
            return scaled.negative(x)
        case "log", (ScaledTensor() as x,):
            return scaled.log(x)
        case _:
            return None
