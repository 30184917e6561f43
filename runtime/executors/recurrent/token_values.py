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
from attnc.compiler.ir.value_nodes import axes, rank
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.executors.recurrent.borders import unhidden
from attnc.runtime.executors.recurrent.call_tokens import CallTokens
from attnc.runtime.executors.recurrent.solves import solve_by_steps
from attnc.runtime.executors.recurrent.token_integers import (
    TOKEN,
    Bound,
    TokenIntegers,
    variables_read,
)
from attnc.runtime.executors.recurrent.token_products import contracted, dotted
from attnc.runtime.values.functions import FUNCTIONS
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
            self._whole[key] = self._ordered(self.by_place(node, bound))
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

    def _ordered(self, x: Tensor) -> Tensor:
        """Return a value by position in processing order."""
        if self.order is None or x.shape[2] == 1:
            return x
        order = torch.from_numpy(self.order).to(x.device)
        x = x.expand(x.shape[0], max(x.shape[1], len(order)), *x.shape[2:])
        return torch.take_along_dim(x, order.reshape(1, *order.shape, *(1,) * (x.ndim - LEAD)), 2)

    def condition(self, node: Index) -> Tensor:
        """Return a condition for all tokens in processing order, bool (B or 1, H or 1, T or 1)."""
        return torch.from_numpy(self.integers.in_order(node) != 0).to(self.tokens.q.device)


def reads_state(node: Value) -> bool:
    """Check whether a value depends on a state."""
    return any(isinstance(child, ir.StateAt) for child in node.below)


class _CachedValues:
    """Values of one token, or of all tokens (`token` None), each computed once."""

    def __init__(self, values: TokenValues, states: States, token: int | None, bound: Bound) -> None:
        self._values = values
        self._tokens = values.tokens
        self._states = states
        self._token = token
        self._bound = bound
        self._cache: dict[Value, Tensor] = {}

    def of(self, node: Value) -> Tensor:
        """Return a value, computed when it is first read."""
        if self._token is None:
            return self._values.by_place(node, self._bound)
        if not reads_state(node):
            values = self._values.whole(node, self._bound)
            return values if values.shape[2] == 1 else values[:, :, self._token : self._token + 1]
        if node not in self._cache:
            self._cache[node] = self.fresh(node)
        return self._cache[node]

    def _is_computed(self, node: Value) -> bool:
        return node in self._cache

    def fresh(self, node: Value) -> Tensor:  # noqa: C901  one case a node kind
        """Compute a value from its operands."""
        match node:
            case ir.Number(value=value):
                return self._number(value)
            case ir.Scale():
                return self._number(self._tokens.scale)
            case ir.Ratio():
                return self._ratio(node)
            case ir.Vec():
                return self._vector(node)
            case ir.Element():
                return self._element(node)
            case ir.StateAt():
                return self._states[node]
            case ir.Apply(op=op, operands=operands):
                return self._apply(node, op, operands)
            case ir.FloatSelect():
                return self._select(node)
            case ir.ValueReduce():
                return self._reduce(node)
            case ir.VisibleReduce():
                raise UnsupportedError("a sum over the keys of a row is not supported in a recurrence")
            case _:
                return self._vector_operation(node)

    # --- numbers -----------------------------------------------------------------------------------------------------

    def _number(self, value: float) -> Tensor:
        return self._tokens.q.new_full((1,) * LEAD, value)

    def _ratio(self, node: ir.Ratio) -> Tensor:
        if isinstance(node.num, ir.Const) and isinstance(node.den, ir.Const) and node.den.value:
            return self._number(node.num.value / node.den.value)  # of any size
        num, den = (self._integers(part).astype(np.float64) for part in (node.num, node.den))
        if (den == 0).any():
            raise EvaluationError("A901", "division by zero", None, "test the divisor first: `… if n != 0 else …`")
        return self._tensor(num / den).to(self._tokens.q.dtype)

    def _integers(self, node: Index) -> NDArray[np.int64]:
        if self._token is None:
            return self._values.integers.of(node, self._bound)
        integers = self._values.integers.in_order(node, self._bound)
        return integers if integers.shape[2] == 1 else integers[:, :, self._token : self._token + 1]

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._tokens.q.device)

    # --- operands ----------------------------------------------------------------------------------------------------

    def _vector(self, node: ir.Vec) -> Tensor:
        if node.head is not fold.head_index("head") or node.at is not TOKEN:
            raise UnsupportedError(f"`{node.tensor}` of another token or head is not supported in a recurrence")
        t = self._tokens
        return {"q": t.q, "k": t.k, "v": t.v}[node.tensor]

    def _element(self, node: ir.Element) -> Tensor:
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
            x = self._picked(x, index)
        return x

    def _picked(self, x: Tensor, index: Index) -> Tensor:
        """Return the entries of the first axis after the leading axes at an index."""
        indices = self._integers(index)
        size = x.shape[LEAD]
        if (indices < 0).any() or (indices >= size).any():
            worst = int(indices[(indices < 0) | (indices >= size)][0])
            raise EvaluationError("A902", f"the index {worst} is out of range", None, f"there are {size} entries")
        if (indices == indices.flat[0]).all():
            return x.select(LEAD, int(indices.flat[0]))
        index_tensor = self._tensor(indices)
        shape = tuple(map(max, x.shape[:LEAD], index_tensor.shape))
        index_tensor = index_tensor.expand(shape).reshape(*shape, *(1,) * (x.ndim - LEAD))
        x = x.expand(*shape, *x.shape[LEAD:])
        return torch.take_along_dim(x, index_tensor.expand(*shape, 1, *x.shape[LEAD + 1 :]), LEAD).squeeze(LEAD)

    # --- functions ---------------------------------------------------------------------------------------------------

    def _apply(self, node: Value, op: str, operands: tuple[Value, ...]) -> Tensor:
        result_axes = axes(node)
        fused = self._fused(op, operands, result_axes)
        if fused is not None:
            return fused
        arguments = self._aligned(operands, result_axes)
        if op == "mul":
            arguments = self._guarded(operands, arguments)
        if op == "softmax":
            return torch.softmax(arguments[0], -1)
        if op == "share":
            numerator, divisor = arguments
            empty = (divisor == 0) & (numerator == 0)
            return torch.where(empty, 0, numerator / torch.where(empty, 1, divisor))
        return FUNCTIONS[op](*arguments)

    def _aligned(self, operands: tuple[Value, ...], result_axes: tuple[str | int, ...]) -> list[Tensor]:
        return [aligned(self.of(operand), axes(operand), result_axes) for operand in operands]

    def _guarded(self, operands: tuple[Value, ...], factors: list[Tensor]) -> list[Tensor]:
        """Return the factors of a product, with the state replaced by 0 where the other factor is 0 (if guarded)."""
        read_states = list(map(reads_state, operands))
        if not self._values.guarded or sum(read_states) != 1 or len(factors) != 2:
            return factors
        state_place = read_states.index(True)
        factors[state_place] = unhidden(factors[1 - state_place], factors[state_place])
        return factors

    def _fused(self, op: str, operands: tuple[Value, ...], result_axes: tuple[str | int, ...]) -> Tensor | None:
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
                factors = self._guarded(product.operands, self._aligned(product.operands, result_axes))
                parts = [aligned(self.of(x), axes(x), result_axes), *factors]
                return torch.addcmul(*parts) if len({part.dtype for part in parts}) == 1 else None
        return None

    def _condition(self, node: Index) -> Tensor:
        return self._tensor(self._integers(node) != 0)

    def _select(self, node: ir.FloatSelect) -> Tensor:
        result_axes = axes(node)
        condition = self._condition(node.condition)
        condition = condition.reshape(*condition.shape, *(1,) * len(result_axes))
        then, otherwise = (aligned(self.of(side), axes(side), result_axes) for side in (node.then, node.otherwise))
        return torch.where(condition, then, otherwise)

    def _reduce(self, node: ir.ValueReduce) -> Tensor:
        low, high = (self._integers(end) for end in (node.low, node.high))
        parts = []
        empty = {"sum": 0.0, "min": float("inf"), "max": -float("inf")}[node.op]
        for j in range(int(low.min()), int(high.max())):
            inner = _CachedValues(self._values, self._states, self._token, (*self._bound, (node.var, j)))
            included = (low <= j) & (j < high) & (inner._integers(node.condition) != 0)
            value = inner.of(node.body)
            if included.all():
                parts.append(value)
                continue
            mask = self._tensor(included).reshape(*included.shape, *(1,) * (value.ndim - LEAD))
            parts.append(torch.where(mask, value, empty))
        if not parts:
            return self._number(empty)
        join = FUNCTIONS["add" if node.op == "sum" else node.op]
        return reduce(join, parts)

    # --- vectors -----------------------------------------------------------------------------------------------------

    def _vector_operation(self, node: Value) -> Tensor:
        match node:
            case ir.Dot(left=left, right=right):
                return dotted(self.of(left), self.of(right))
            case ir.Outer(left=left, right=right):
                return self.of(left)[..., :, None] * self.of(right)[..., None, :]
            case ir.Contract():
                return self._contract(node)
            case ir.Pick(vector=vector, index=index):
                return self._picked(self.of(vector), index)
            case ir.VectorPart(vector=vector, number=number, of=count):
                return self.of(vector).chunk(count, -1)[number]
            case ir.Diagonal(vector=vector):
                return torch.diag_embed(self.of(vector))
            case ir.Eye(size=size):
                width = int(self._integers(size).flat[0])
                q = self._tokens.q
                return torch.eye(width, dtype=q.dtype, device=q.device).reshape(*(1,) * LEAD, width, width)
            case ir.Solve():
                return self._solve(node)
        raise AssertionError(type(node).__name__)

    def _contract(self, node: ir.Contract, *, real: bool = False) -> Tensor:
        """Contract two values over an axis of each; `real`: compute only the real part."""
        shapes = (rank(node.left), node.left_axis), (rank(node.right), node.right_axis)
        return contracted(self.of(node.left), self.of(node.right), *shapes, real=real)

    def _solve(self, node: ir.Solve) -> Tensor:
        matrix, vector = self.of(node.matrix), self.of(node.vector)
        lead = tuple(map(max, matrix.shape[:LEAD], vector.shape[:LEAD]))
        matrix, vector = matrix.expand(*lead, *matrix.shape[LEAD:]), vector.expand(*lead, *vector.shape[LEAD:])
        if node.steps is not None:
            return solve_by_steps(matrix, vector, node.steps)
        solved: Tensor
        solved, singular = torch.linalg.solve_ex(matrix, vector[..., None])
        if singular.any():
            help_ = "add something to its diagonal: `… + 0.01 * eye(dk)`"
            raise EvaluationError("A901", "the matrix of `solve` is singular", None, help_)
        return solved[..., 0]


def _is_apply(node: Value, op: str) -> TypeGuard[ir.Apply]:
    return isinstance(node, ir.Apply) and node.op == op


class StretchValues(_CachedValues):
    """Values of a stretch of tokens, computed from given values and conditions of these tokens."""

    def __init__(self, values: TokenValues, leaves: Mapping[Value | Index, Tensor]) -> None:
        super().__init__(values, {}, None, ())
        self._leaves = leaves

    def of(self, node: Value) -> Tensor:
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


def aligned(x: Tensor, own: tuple[str | int, ...], wanted: tuple[str | int, ...]) -> Tensor:
    """Return a value with axes `own`, reshaped to the axes `wanted`: size 1 for each axis that it lacks."""
    if own == wanted:
        return x
    remaining = list(own)
    for i, axis in enumerate(wanted):
        if remaining and remaining[0] == axis:
            remaining.pop(0)
        else:
            x = x.unsqueeze(LEAD + i)
    return x


__all__ = ["StretchValues", "TokenValues", "aligned", "reads_state"]
