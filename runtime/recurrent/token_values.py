"""Floating-point values of the IR of a recurrence as torch tensors: of all tokens at once, or of one with its states.

A value is a tensor (B or 1, H or 1, T or 1, …), the axes of the value last, in their order.
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

from attnc.compiler import fold, ir
from attnc.compiler.ir import Index, Value
from attnc.compiler.value_nodes import axes, rank
from attnc.runtime.call_errors import UnsupportedError
from attnc.runtime.functions import FUNCTIONS
from attnc.runtime.recurrent.borders import unhidden
from attnc.runtime.recurrent.call_tokens import CallTokens
from attnc.runtime.recurrent.solves import solve_by_steps
from attnc.runtime.recurrent.token_integers import TOKEN, Bound, TokenIntegers, variables_read
from attnc.runtime.recurrent.token_products import contracted, dotted
from attnc.spec.errors import EvaluationError

LEAD = 3
"""Batch, heads and tokens."""


States = Mapping[Value, Tensor]
"""The values of states, each (B, H, 1, …)."""


@dataclass
class TokenValues:
    """Values of one call. Those that read no state are computed for all tokens, once.

    `order`: the places of the tokens as they are taken, (H or 1, T); None: one after another. `guarded`: a factor of 0
    leaves 0 of a state that is not finite.
    """

    tokens: CallTokens
    order: NDArray[np.int64] | None = None
    guarded: bool = False
    _whole: dict[tuple[Value, Bound], Tensor] = field(default_factory=dict)
    _by_place: dict[tuple[Value, Bound], Tensor] = field(default_factory=dict)

    @cached_property
    def integers(self) -> TokenIntegers:
        """The exact parts of the values."""
        return TokenIntegers(self.tokens, self.order)

    def of(self, node: Value, states: States, token: int, bound: Bound = ()) -> Tensor:
        """The value for the token at index `token` in processing order, (B or 1, H or 1, 1, …)."""
        if not reads_state(node):
            whole = self.whole(node, bound)
            return whole if whole.shape[2] == 1 else whole[:, :, token : token + 1]
        return _OnceValues(self, states, token, bound).of(node)

    def whole(self, node: Value, bound: Bound = ()) -> Tensor:
        """A value that reads no state, of all tokens in the order in which they are taken."""
        if self.order is None:
            return self.by_place(node, bound)
        key = node, variables_read(node, bound)
        if key not in self._whole:
            self._whole[key] = self._taken(self.by_place(node, bound))
        return self._whole[key]

    def by_place(self, node: Value, bound: Bound = ()) -> Tensor:
        """Return the value by position instead of processing order."""
        if node in self.tokens.constants:
            return self.tokens.constants[node]
        free = variables_read(node, bound)
        if (node, free) not in self._by_place:
            self._by_place[node, free] = _OnceValues(self, {}, None, free).fresh(node)
        return self._by_place[node, free]

    def widened(self, node: Value) -> Tensor:
        """A value of all tokens in fp64, here and for whoever reads it from now on: its gradient is summed in fp64."""
        self._by_place[node, ()] = self.by_place(node).double()
        self._whole.pop((node, ()), None)
        return self.whole(node)

    def taken_back(self, node: Value) -> Tensor | None:
        """A value that was computed, to do with it what one likes; None where another value, or autograd, has it too.

        It is computed anew for whoever asks again.
        """
        if torch.is_grad_enabled() or self.order is not None or node in self.tokens.constants:
            return None
        found = self._by_place.pop((node, ()), None)
        kept = {x.untyped_storage().data_ptr() for x in self._by_place.values()}
        return None if found is None or found.untyped_storage().data_ptr() in kept else found

    def _taken(self, x: Tensor) -> Tensor:
        """A value of all tokens in the order in which they are taken."""
        if self.order is None or x.shape[2] == 1:
            return x
        order = torch.from_numpy(self.order).to(x.device)
        x = x.expand(x.shape[0], max(x.shape[1], len(order)), *x.shape[2:])
        return torch.take_along_dim(x, order.reshape(1, *order.shape, *(1,) * (x.ndim - LEAD)), 2)

    def condition(self, node: Index) -> Tensor:
        """A condition of all tokens in the order in which they are taken, bool (B or 1, H or 1, T or 1)."""
        return torch.from_numpy(self.integers.in_order(node) != 0).to(self.tokens.q.device)


def reads_state(node: Value) -> bool:
    """Whether a value depends on a state."""
    return any(isinstance(below, ir.StateAt) for below in node.below)


class _OnceValues:
    """Values of one token, or of all of them (`token` None)."""

    def __init__(self, values: TokenValues, states: States, token: int | None, bound: Bound) -> None:
        self._values = values
        self._tokens = values.tokens
        self._states = states
        self._token = token
        self._bound = bound
        self._known: dict[Value, Tensor] = {}

    def of(self, node: Value) -> Tensor:
        """A value."""
        if self._token is None:
            return self._values.by_place(node, self._bound)
        if not reads_state(node):
            whole = self._values.whole(node, self._bound)
            return whole if whole.shape[2] == 1 else whole[:, :, self._token : self._token + 1]
        if node not in self._known:
            self._known[node] = self.fresh(node)
        return self._known[node]

    def _is_known(self, node: Value) -> bool:
        return node in self._known

    def fresh(self, node: Value) -> Tensor:  # noqa: C901  one case a node kind
        """A value that is not known yet."""
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
                return self._total(node)
            case ir.VisibleReduce():
                raise UnsupportedError("a sum over the keys of a row in a recurrence")
            case _:
                return self._of_vectors(node)

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
        found = self._values.integers.in_order(node, self._bound)
        return found if found.shape[2] == 1 else found[:, :, self._token : self._token + 1]

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._tokens.q.device)

    # --- operands ----------------------------------------------------------------------------------------------------

    def _vector(self, node: ir.Vec) -> Tensor:
        if node.head is not fold.head_index("head") or node.at is not TOKEN:
            raise UnsupportedError(f"`{node.tensor}` of another token or head in a recurrence")
        t = self._tokens
        return {"q": t.q, "k": t.k, "v": t.v}[node.tensor]

    def _element(self, node: ir.Element) -> Tensor:
        """An input's element: its dimensions of batch, heads and tokens first, others by their indices."""
        tokens, tensor = self._tokens, node.tensor
        x, lead, rest = tokens.inputs[tensor.name], [-1] * LEAD, list[tuple[int, Index]]()
        for i, (dim, index) in enumerate(zip(tensor.dims, node.indices, strict=False)):
            where = _LEADING.get(str(dim))
            if where is None:
                rest.append((i, index))
            else:
                lead[where] = i
        width = len(tensor.dims) - len(node.indices)
        order = [i for i in lead if i >= 0] + [i for i, _ in rest] + list(range(x.ndim - width, x.ndim))
        x = x.permute(order)
        for place, i in enumerate(lead):
            if i < 0:
                x = x.unsqueeze(place)
        if "kv_head" in tensor.dims:
            x = x.repeat_interleave(tokens.group, 1)
        for _, index in rest:
            x = self._picked(x, index)
        return x

    def _picked(self, x: Tensor, index: Index) -> Tensor:
        """The entries of the first axis behind those of the lead."""
        at = self._integers(index)
        size = x.shape[LEAD]
        if (at < 0).any() or (at >= size).any():
            worst = int(at[(at < 0) | (at >= size)][0])
            raise EvaluationError("A902", f"the index {worst} is out of range", None, f"there are {size} entries")
        if (at == at.flat[0]).all():
            return x.select(LEAD, int(at.flat[0]))
        places = self._tensor(at)
        shape = tuple(map(max, x.shape[:LEAD], places.shape))
        places = places.expand(shape).reshape(*shape, *(1,) * (x.ndim - LEAD))
        x = x.expand(*shape, *x.shape[LEAD:])
        return torch.take_along_dim(x, places.expand(*shape, 1, *x.shape[LEAD + 1 :]), LEAD).squeeze(LEAD)

    # --- functions ---------------------------------------------------------------------------------------------------

    def _apply(self, node: Value, op: str, operands: tuple[Value, ...]) -> Tensor:
        wanted = axes(node)
        fused = self._fused(op, operands, wanted)
        if fused is not None:
            return fused
        found = self._aligned(operands, wanted)
        if op == "mul":
            found = self._guarded(operands, found)
        if op == "softmax":
            return torch.softmax(found[0], -1)
        if op == "share":
            top, whole = found
            empty = (whole == 0) & (top == 0)
            return torch.where(empty, 0, top / torch.where(empty, 1, whole))
        return FUNCTIONS[op](*found)

    def _aligned(self, operands: tuple[Value, ...], wanted: tuple[str | int, ...]) -> list[Tensor]:
        return [aligned(self.of(operand), axes(operand), wanted) for operand in operands]

    def _guarded(self, operands: tuple[Value, ...], found: list[Tensor]) -> list[Tensor]:
        """The operands of a product, of which a state that a factor of 0 hides is 0."""
        of_states = list(map(reads_state, operands))
        if not self._values.guarded or sum(of_states) != 1 or len(found) != 2:
            return found
        place = of_states.index(True)
        found[place] = unhidden(found[1 - place], found[place])
        return found

    def _fused(self, op: str, operands: tuple[Value, ...], wanted: tuple[str | int, ...]) -> Tensor | None:
        """x + a b in one pass, and the exponential of what nobody else reads in its place; None: one by one."""
        if op == "exp" and _is_apply(operands[0], "mul") and not reads_state(operands[0]):
            inner = self.fresh(operands[0])
            return inner.exp() if inner.requires_grad else inner.exp_()
        if op == "real" and isinstance(operands[0], ir.Contract) and not self._is_known(operands[0]):
            return self._contract(operands[0], real=True)
        if op != "add" or len(operands) != 2:
            return None
        for x, product in (operands, operands[::-1]):
            if _is_apply(product, "mul") and len(product.operands) == 2:
                factors = self._guarded(product.operands, self._aligned(product.operands, wanted))
                parts = [aligned(self.of(x), axes(x), wanted), *factors]
                return torch.addcmul(*parts) if len({part.dtype for part in parts}) == 1 else None
        return None

    def _condition(self, node: Index) -> Tensor:
        return self._tensor(self._integers(node) != 0)

    def _select(self, node: ir.FloatSelect) -> Tensor:
        wanted = axes(node)
        condition = self._condition(node.condition)
        condition = condition.reshape(*condition.shape, *(1,) * len(wanted))
        then, otherwise = (aligned(self.of(side), axes(side), wanted) for side in (node.then, node.otherwise))
        return torch.where(condition, then, otherwise)

    def _total(self, node: ir.ValueReduce) -> Tensor:
        low, high = (self._integers(end) for end in (node.low, node.high))
        parts = []
        empty = {"sum": 0.0, "min": float("inf"), "max": -float("inf")}[node.op]
        for j in range(int(low.min()), int(high.max())):
            inner = _OnceValues(self._values, self._states, self._token, (*self._bound, (node.var, j)))
            there = (low <= j) & (j < high) & (inner._integers(node.condition) != 0)
            value = inner.of(node.body)
            if there.all():
                parts.append(value)
                continue
            mask = self._tensor(there).reshape(*there.shape, *(1,) * (value.ndim - LEAD))
            parts.append(torch.where(mask, value, empty))
        if not parts:
            return self._number(empty)
        join = FUNCTIONS["add" if node.op == "sum" else node.op]
        return reduce(join, parts)

    # --- vectors -----------------------------------------------------------------------------------------------------

    def _of_vectors(self, node: Value) -> Tensor:
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
        """`real`: the real part alone."""
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
            raise EvaluationError("A901", "`solve` of a matrix that is singular", None, help_)
        return solved[..., 0]


def _is_apply(node: Value, op: str) -> TypeGuard[ir.Apply]:
    return isinstance(node, ir.Apply) and node.op == op


class StretchValues(_OnceValues):
    """Values of some tokens, of values and conditions that are known of them."""

    def __init__(self, values: TokenValues, known: Mapping[Value | Index, Tensor]) -> None:
        super().__init__(values, {}, None, ())
        self._given = known

    def of(self, node: Value) -> Tensor:
        """A value."""
        if node in self._given:
            return self._given[node]
        if node not in self._known:
            self._known[node] = self.fresh(node)
        return self._known[node]

    def _is_known(self, node: Value) -> bool:
        return node in self._given or node in self._known

    def _condition(self, node: Index) -> Tensor:
        return self._given[node]


_LEADING = {"batch": 0, "head": 1, "kv_head": 1, "token": 2, "query": 2, "key": 2}


def aligned(x: Tensor, own: tuple[str | int, ...], wanted: tuple[str | int, ...]) -> Tensor:
    """A value with axes of size 1 where it has none of the wanted ones."""
    if own == wanted:
        return x
    rest = list(own)
    for place, axis in enumerate(wanted):
        if rest and rest[0] == axis:
            rest.pop(0)
        else:
            x = x.unsqueeze(LEAD + place)
    return x


__all__ = ["StretchValues", "TokenValues", "aligned", "reads_state"]
