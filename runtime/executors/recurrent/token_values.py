"""Floating-point values of a recurrence's IR as torch tensors: for all tokens at once, or for one token and its states.

A value is a tensor (B or 1, H or 1, T or 1, …), followed by the axes of the IR value in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir import Index, Value, fold
from attnc.compiler.ir.value_nodes import Axes, axes, rank
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.recurrent.borders import unhidden
from attnc.runtime.executors.recurrent.call_tokens import TOKEN, CallTokens
from attnc.runtime.executors.recurrent.solves import solve_by_steps
from attnc.runtime.executors.recurrent.token_integers import (
    Bound,
    TokenIntegers,
    variables_read,
)
from attnc.runtime.executors.recurrent.token_products import contracted, dotted
from attnc.runtime.values.functions import FUNCTIONS
from attnc.runtime.values.masked_reductions import NEUTRAL
from attnc.runtime.values.quantity_shapes import append_tensor_dims
from attnc.runtime.values.scaled import plain
from attnc.runtime.values.value_walk import ValueWalk
from attnc.spec.errors import EvaluationError

LEAD = 3
"""Number of leading axes: batch, heads and tokens."""

States = Mapping[Value, Tensor]
"""The values of states, each (B, H, 1, …)."""


@dataclass
class TokenValues:
    """Values of one call. A value that reads no state is computed once, for all tokens.

    `order`: the positions of the tokens in processing order, (H or 1, T); None: the order of positions. `guarded`: a
    factor of 0 times a state is 0, even if the state is not finite.
    """

    tokens: CallTokens
    order: NDArray[np.int64] | None = None
    guarded: bool = False
    _whole: dict[tuple[Value, Bound], Tensor] = field(default_factory=dict)
    _by_place: dict[tuple[Value, Bound], Tensor] = field(default_factory=dict)

    @cached_property
    def integers(self) -> TokenIntegers:
        """The integers and conditions that values contain, computed exactly."""
        return TokenIntegers(self.tokens, self.order)

    def of(self, node: Value, states: States, token: int, bound: Bound = ()) -> Tensor:
        """Return the value for the token at index `token` in processing order, (B or 1, H or 1, 1, …)."""
        if not reads_state(node):
            values = self.whole(node, bound)
            return values if values.shape[2] == 1 else values[:, :, token : token + 1]
        return _CachedValues(self, states, token, bound).of(node)

    def whole(self, node: Value, bound: Bound = ()) -> Tensor:
        """Return a value that reads no state for all tokens, in processing order."""
        if self.order is None:
            return self.by_place(node, bound)
        key = node, variables_read(node, bound)
        if key not in self._whole:
            self._whole[key] = reordered(self.by_place(node, bound), self.order)
        return self._whole[key]

    def by_place(self, node: Value, bound: Bound = ()) -> Tensor:
        """Return the value by position instead of processing order."""
        if node in self.tokens.constants:
            return self.tokens.constants[node]
        free = variables_read(node, bound)
        if (node, free) not in self._by_place:
            self._by_place[node, free] = _CachedValues(self, {}, None, free).fresh(node)
        return self._by_place[node, free]

    def widened(self, node: Value) -> Tensor:
        """Return the value for all tokens in fp64, and keep it so for later readers: its gradient is summed in fp64."""
        self._by_place[node, ()] = self.by_place(node).double()
        self._whole.pop((node, ()), None)
        return self.whole(node)

    def taken_back(self, node: Value) -> Tensor | None:
        """Return a computed value that the caller may overwrite; None if another value or autograd shares its memory.

        The value is computed again when it is read again.
        """
        if torch.is_grad_enabled() or self.order is not None or node in self.tokens.constants:
            return None
        value = self._by_place.pop((node, ()), None)
        shared = {x.untyped_storage().data_ptr() for x in self._by_place.values()}
        return None if value is None or value.untyped_storage().data_ptr() in shared else value

    def vectors(self, node: Value | None, width: int, dtype: torch.dtype, bound: Bound = ()) -> Tensor:
        """Return a vector for every token, (B, H, T, width); None gives zeros, a number is broadcast."""
        shape = (*self.tokens.counts, width)
        if node is None:
            return self.tokens.q.new_zeros((), dtype=dtype).expand(shape)
        value = self.whole(node, bound).to(dtype)
        return (value if rank(node) else value[..., None]).expand(shape)

    def condition(self, node: Index) -> Tensor:
        """Return a condition for all tokens in processing order, bool (B or 1, H or 1, T or 1)."""
        return torch.from_numpy(self.integers.in_order(node) != 0).to(self.tokens.q.device)


def reordered(x: Tensor, order: NDArray[np.int64] | None) -> Tensor:
    """Return values whose tokens are those at the indices `order`, (H or 1, T); None: unchanged."""
    if order is None or x.shape[2] == 1:
        return x
    indices = torch.from_numpy(order).to(x.device)
    x = x.expand(x.shape[0], max(x.shape[1], len(indices)), *x.shape[2:])
    return torch.take_along_dim(x, append_tensor_dims(indices[None], x.ndim - LEAD), 2)


def reads_state(node: Value) -> bool:
    """Check whether a value depends on a state."""
    return any(isinstance(child, ir.StateAt) for child in node.below)


class _CachedValues(ValueWalk):
    """Values of one token, or of all tokens (`token` None), each computed once."""

    lead = LEAD

    def __init__(self, values: TokenValues, states: States, token: int | None, bound: Bound) -> None:
        self._values = values
        self._tokens = values.tokens
        self._states = states
        self._token = token
        self._bound = bound
        self._cache: dict[Value, Tensor] = {}

    @property
    def scale(self) -> float:
        """The call's scale."""
        return self._tokens.scale

    def quantity(self, node: Value) -> Tensor:
        """Return a value, computed when it is first read."""
        if self._token is None:
            return self._values.by_place(node, self._bound)
        if not reads_state(node):
            values = self._values.whole(node, self._bound)
            return values if values.shape[2] == 1 else values[:, :, self._token : self._token + 1]
        if node not in self._cache:
            self._cache[node] = self.fresh(node)
        return self._cache[node]

    def fresh(self, node: Value) -> Tensor:
        """Compute a value from its operands, without storing it."""
        return plain(self.compute(node))

    def _is_computed(self, node: Value) -> bool:
        return node in self._cache

    # --- leaves ------------------------------------------------------------------------------------------------------

    def constant(self, value: float) -> Tensor:
        """Return a number with leading dimensions of size one."""
        return self._tokens.q.new_full((1,) * LEAD, value)

    def ratio(self, node: ir.Ratio) -> Tensor:
        """Return an exact ratio. Raises EvaluationError where a divisor is zero."""
        if isinstance(node.num, ir.Const) and isinstance(node.den, ir.Const) and node.den.value:
            return self.constant(node.num.value / node.den.value)  # of any size
        num, den = (self.integers(part).astype(np.float64) for part in (node.num, node.den))
        if (den == 0).any():
            raise EvaluationError("A901", "division by zero", None, "test the divisor first: `… if n != 0 else …`")
        return self.tensor(num / den).to(self._tokens.q.dtype)

    def integers(self, node: Index) -> NDArray[np.int64]:
        """Return an integer, or a condition as 0 and 1, for the token or for all tokens."""
        if self._token is None:
            return self._values.integers.of(node, self._bound)
        integers = self._values.integers.in_order(node, self._bound)
        return integers if integers.shape[2] == 1 else integers[:, :, self._token : self._token + 1]

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """Return an array as a tensor on the device of the call."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._tokens.q.device)

    def vector(self, node: ir.Vec) -> Tensor:
        """Return the vectors of q, k or v of the tokens."""
        if node.head is not fold.head_index("head") or node.at is not TOKEN:
            raise UnsupportedError(f"`{node.tensor}` of another token or head is not supported in a recurrence")
        t = self._tokens
        return {"q": t.q, "k": t.k, "v": t.v}[node.tensor]

    def element(self, node: ir.Element) -> Tensor:
        """Return an input's element: batch, heads and tokens become leading axes, other dimensions are indexed."""
        tokens, tensor = self._tokens, node.tensor
        x, sources, indexed = tokens.inputs[tensor.name], [-1] * LEAD, list[tuple[int, Index]]()
        for i, (dim, index) in enumerate(zip(tensor.dims, node.indices, strict=False)):
            leading = _LEADING.get(str(dim))
            if leading is None:
                indexed.append((i, index))
            else:
                sources[leading] = i
        width = len(tensor.dims) - len(node.indices)
        order = [i for i in sources if i >= 0] + [i for i, _ in indexed] + list(range(x.ndim - width, x.ndim))
        x = x.permute(order)
        for axis, i in enumerate(sources):
            if i < 0:
                x = x.unsqueeze(axis)
        if "kv_head" in tensor.dims:
            x = x.repeat_interleave(tokens.group, 1)
        for _, index in indexed:
            x = self.picked(x, index)
        return x

    # --- functions ---------------------------------------------------------------------------------------------------

    def _apply(self, node: ir.Apply) -> Tensor:
        op, result_axes = node.op, axes(node)
        fused = self._fused(op, node.operands, result_axes)
        if fused is not None:
            return fused
        arguments = self._arguments(node.operands, result_axes)
        if op == "mul":
            arguments = self._guarded(node.operands, arguments)
        if op == "softmax":
            return torch.softmax(arguments[0], -1)
        if op == "share":
            numerator, divisor = arguments
            empty = (divisor == 0) & (numerator == 0)
            return torch.where(empty, 0, numerator / torch.where(empty, 1, divisor))
        return FUNCTIONS[op](*arguments)

    def _arguments(self, operands: tuple[Value, ...], result_axes: Axes) -> list[Tensor]:
        return [plain(self.aligned(operand, result_axes)) for operand in operands]

    def _guarded(self, operands: tuple[Value, ...], factors: list[Tensor]) -> list[Tensor]:
        """Return the factors of a product, with the state replaced by 0 where the other factor is 0 (if guarded)."""
        read_states = list(map(reads_state, operands))
        if not self._values.guarded or sum(read_states) != 1 or len(factors) != 2:
            return factors
        state_place = read_states.index(True)
        factors[state_place] = unhidden(factors[1 - state_place], factors[state_place])
        return factors

    def _fused(self, op: str, operands: tuple[Value, ...], result_axes: Axes) -> Tensor | None:
        """Compute x + a b in one pass, or an exponential in place; None if operations run one by one."""
        if op == "exp" and _is_apply(operands[0], "mul") and not reads_state(operands[0]):
            inner = self.fresh(operands[0])
            return inner.exp() if inner.requires_grad else inner.exp_()
        if op == "real" and isinstance(operands[0], ir.Contract) and not self._is_computed(operands[0]):
            return self._contract(operands[0], real=True)
        if op != "add" or len(operands) != 2:
            return None
        for x, product in (operands, operands[::-1]):
            if _is_apply(product, "mul") and len(product.operands) == 2:
                factors = self._guarded(product.operands, self._arguments(product.operands, result_axes))
                parts = [plain(self.aligned(x, result_axes)), *factors]
                return torch.addcmul(*parts) if len({part.dtype for part in parts}) == 1 else None
        return None

    def _condition(self, node: Index) -> Tensor:
        return self.tensor(self.integers(node) != 0)

    def _select(self, node: ir.FloatSelect) -> Tensor:
        result_axes = axes(node)
        condition = self._condition(node.condition)
        then, otherwise = self._arguments((node.then, node.otherwise), result_axes)
        return torch.where(append_tensor_dims(condition, len(result_axes)), then, otherwise)

    def _reduce_visible(self, node: ir.VisibleReduce) -> Tensor:
        raise UnsupportedError("a sum over the keys of a row is not supported in a recurrence")

    def _reduce_range(self, node: ir.ValueReduce) -> Tensor:
        low, high = (self.integers(end) for end in (node.low, node.high))
        parts, empty = [], NEUTRAL[node.op]
        for j in range(int(low.min()), int(high.max())):
            inner = _CachedValues(self._values, self._states, self._token, (*self._bound, (node.var, j)))
            included = (low <= j) & (j < high) & (inner.integers(node.condition) != 0)
            value = inner.of(node.body)
            if included.all():
                parts.append(value)
                continue
            parts.append(torch.where(append_tensor_dims(self.tensor(included), value.ndim - LEAD), value, empty))
        if not parts:
            return self.constant(empty)
        join = FUNCTIONS["add" if node.op == "sum" else node.op]
        return reduce(join, parts)

    # --- vectors -----------------------------------------------------------------------------------------------------

    def _compute_state(self, node: ir.Contract | ir.Diagonal | ir.StateAt | ir.Ranking) -> Tensor:
        match node:
            case ir.StateAt():
                return self._states[node]
            case ir.Contract():
                return self._contract(node)
            case ir.Diagonal(vector=vector):
                return torch.diag_embed(self.of(vector))
        raise AssertionError(type(node).__name__)

    def _dot(self, node: ir.Dot) -> Tensor:
        return dotted(self.of(node.left), self.of(node.right))

    def _solve_by_steps(self, matrix: Tensor, vector: Tensor, steps: int) -> Tensor:
        shape = torch.Size((*vector.shape[:-1], *matrix.shape[-2:]))
        return solve_by_steps(matrix.expand(shape), vector, steps)

    def _contract(self, node: ir.Contract, *, real: bool = False) -> Tensor:
        """Contract two values over an axis of each; `real`: compute only the real part."""
        shapes = (rank(node.left), node.left_axis), (rank(node.right), node.right_axis)
        return contracted(self.of(node.left), self.of(node.right), *shapes, real=real)


def _is_apply(node: Value, op: str) -> TypeGuard[ir.Apply]:
    return isinstance(node, ir.Apply) and node.op == op


class StretchValues(_CachedValues):
    """Values of a stretch of tokens, computed from given values and conditions of these tokens."""

    def __init__(self, values: TokenValues, leaves: Mapping[Value | Index, Tensor]) -> None:
        super().__init__(values, {}, None, ())
        self._leaves = leaves

    def quantity(self, node: Value) -> Tensor:
        """Return a value, computed when it is first read."""
        if node in self._leaves:
            return self._leaves[node]
        if node not in self._cache:
            self._cache[node] = self.fresh(node)
        return self._cache[node]

    def _is_computed(self, node: Value) -> bool:
        return node in self._leaves or node in self._cache

    def _condition(self, node: Index) -> Tensor:
        return self._leaves[node]


_LEADING = {"batch": 0, "head": 1, "kv_head": 1, "token": 2, "query": 2, "key": 2}
