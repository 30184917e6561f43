"""Floating-point values of the IR as torch tensors, over blocks of pairs: what scores and extra logits are made of.

Everything is differentiable in q, k and the real inputs. Lanes that nobody sees hold finite numbers that depend on
nothing, so that they poison no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from attnc.compiler import fold, ir
from attnc.compiler.analysis import exact
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.lowering.specialise import Sizes, Slices, Window, specialise
from attnc.compiler.rewrite import substitute, substitute_value
from attnc.compiler.values import reads
from attnc.spec.errors import EvaluationError
from attnc.spec.source import Span

Int64 = NDArray[np.int64]
Alive = NDArray[np.bool_]


@dataclass(frozen=True)
class Operands:
    """One call: q (B, Hq, Nq, dk) and k (B, Hkv, Nk, dk), the real inputs, sizes and int inputs, the scale.

    Values are computed in `dtype`.
    """

    q: Tensor
    k: Tensor
    inputs: Mapping[str, Tensor]
    sizes: Sizes
    slices: Slices
    scale: float
    dtype: torch.dtype
    origins: Mapping[ir.Index, Span]

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return max(self.q.shape[1] // max(self.k.shape[1], 1), 1)


@dataclass(frozen=True)
class Block:
    """Local rows and keys of a window of one batch entry, over some heads; `alive`: which pairs are asked for.

    `alive` is bool (heads or 1, rows, keys). `running`: rows are positions that a variable runs over.
    """

    batch: int
    heads: tuple[int, ...]
    window: Window
    rows: Int64
    keys: Int64
    alive: Alive
    running: bool = False

    @property
    def place(self) -> Window:
        """The window, without the shift that makes positions of rows where they are that already."""
        return replace(self.window, shift=0) if self.running else self.window


class Values:
    """Values over one block: tensors (heads or 1, rows or 1, keys or 1), for vectors with a dimension more."""

    def __init__(self, operands: Operands, block: Block, vectors: Mapping[str, Tensor] | None = None) -> None:
        """`vectors`: those of the block's rows, (heads, rows, 1, dk), and keys, where they are at hand."""
        self._operands = operands
        self._block = block
        self._vectors = vectors or {}
        self._known: dict[ir.Value, Tensor] = {}

    def _over(self, alive: Alive) -> Values:
        """The same over fewer pairs."""
        return Values(self._operands, replace(self._block, alive=alive), self._vectors)

    def of(self, node: ir.Value) -> Tensor:
        """The value. Raises EvaluationError where an index or an exact part faults for a pair that is asked for."""
        if node not in self._known:
            self._known[node] = self._of(node)
        return self._known[node]

    def logit(self, node: ir.Value) -> Tensor:
        """The logarithm of what an extra logit, or a vector of them, adds: (heads or 1, rows)."""
        value = self.of(node)
        return (value if value.ndim == 3 else torch.logsumexp(value, -1))[..., 0]

    def _of(self, node: ir.Value) -> Tensor:
        operands = self._operands
        match node:
            case ir.Number():
                return self._constant(node.value)
            case ir.Scale():
                return self._constant(operands.scale)
            case ir.Ratio():
                return self._ratio(node)
            case ir.Vec():
                return self._vector(node)
            case ir.Element():
                return self._element(node)
            case ir.Apply():
                return self._apply(node)
            case ir.Dot():
                return _product(self.of(node.left), self.of(node.right))
            case ir.Select():
                return self._select(node)
            case ir.Total():
                return self._total(node)

    def _constant(self, value: float) -> Tensor:
        return torch.full((1, 1, 1), value, dtype=self._operands.dtype, device=self._operands.q.device)

    # --- exact parts ---

    def _alive(self, node: ir.Value | ir.Index) -> Alive:
        """The lanes that are asked for, over the dimensions that a node reads."""
        read = reads(node)
        unread = tuple(axis for axis, name in enumerate(("head", "q", "k")) if name not in read)
        return np.asarray(self._block.alive.any(axis=unread, keepdims=True))

    def _integers(self, node: ir.Index) -> Int64:
        """An integer, or a condition as 0 and 1: (heads or 1, rows or 1, keys or 1); dead lanes hold anything."""
        block, operands, read = self._block, self._operands, reads(node)
        alive = self._alive(node)
        rows = block.rows if "q" in read else block.rows[:1]
        keys = block.keys if "k" in read else block.keys[:1]
        found = []
        for i, head in enumerate(block.heads if "head" in read else block.heads[:1]):
            own = specialise(
                node,
                operands.sizes,
                operands.slices,
                block.place,
                batch=block.batch,
                head=head,
                group=operands.group,
            )
            here = alive[min(i, len(alive) - 1)]
            span = (0, block.window.n_q), (0, block.window.n_k)
            wide = not fits_word(own, *span)
            found.append(exact.integers_at(own, rows, keys, here, operands.origins, wide=wide))
        return np.stack(found)

    def _tensor(self, array: NDArray[np.int64 | np.bool_]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._operands.q.device)

    def _ratio(self, node: ir.Ratio) -> Tensor:
        num, den = self._integers(node.num), self._integers(node.den)
        alive = self._alive(node.num) & self._alive(node.den)
        if (self._alive(node) & (den == 0)).any():
            raise EvaluationError("A901", "division by zero", None, "test the divisor first: `… if n != 0 else …`")
        exactly = np.where(alive, num, 1) / np.where(alive & (den != 0), den, 1)
        return torch.from_numpy(exactly).to(self._operands.q.device, self._operands.dtype)

    # --- leaves ---

    def _vector(self, node: ir.Vec) -> Tensor:
        if node.tensor in self._vectors:
            return self._vectors[node.tensor]
        block, operands = self._block, self._operands
        heads = torch.tensor(block.heads, device=operands.q.device)
        if node.tensor == "q":
            rows = self._tensor(block.rows + block.window.row)
            return operands.q[block.batch][heads[:, None], rows].to(operands.dtype)[:, :, None]
        keys = self._tensor(block.keys + block.window.key)
        return operands.k[block.batch][heads[:, None] // operands.group, keys].to(operands.dtype)[:, None]

    def _element(self, node: ir.Element) -> Tensor:
        tensor = self._operands.inputs[node.tensor.name]
        found: list[Tensor] = []
        alive = np.ones((1, 1, 1), dtype=np.bool_)
        for axis, (index, dim) in enumerate(zip(node.indices, node.tensor.dims, strict=False)):
            low, size, offset = self._range(dim, tensor.shape[axis])
            here, values = self._alive(index), self._integers(index)
            outside = here & ((values < low) | (values >= low + size))
            if outside.any() and dim != "batch":
                name = dim if isinstance(dim, str) else "this"
                message = (
                    f"`{node.tensor.name}` is read at {int(values[outside][0])}; the `{name}` dimension has {low} to "
                    f"{low + size - 1}"
                )
                raise EvaluationError("A902", message, None, "test the index first: `0 <= i < n and …`")
            at = np.zeros_like(values) if dim == "batch" and tensor.shape[axis] == 1 else values + offset
            found.append(self._tensor(np.clip(at, 0, max(tensor.shape[axis] - 1, 0))))
            alive = alive & here
        tensor = tensor.to(self._operands.dtype)
        value = _gathered(tensor, found) if found else tensor[None, None, None]
        if found and not alive.all():
            lanes = self._tensor(alive).reshape(alive.shape + (1,) * (value.ndim - 3))
            value = torch.where(lanes, value, torch.ones((), dtype=value.dtype, device=value.device))
        return value

    def _range(self, dim: str | int, size: int) -> tuple[int, int, int]:
        """The first index of a dimension, how many there are, and what makes an index an entry of the tensor."""
        window = self._block.window
        match dim:
            case "token" | "key":
                return 0, window.n_k, window.key
            case "query":
                return window.shift, window.n_q, window.row - window.shift
            case _:
                return 0, size, 0

    # --- functions ---

    def _apply(self, node: ir.Apply) -> Tensor:
        operands = [self.of(operand) for operand in node.operands]
        most = max(operand.ndim for operand in operands)
        return FUNCTIONS[node.op](*(o if o.ndim == most else o.unsqueeze(-1) for o in operands))

    def _select(self, node: ir.Select) -> Tensor:
        """Each side over the lanes that take it alone."""
        condition = self._integers(node.condition) != 0
        block = self._block
        sides = []
        for chosen, side in ((condition, node.then), (~condition, node.otherwise)):
            sides.append(self._over(block.alive & chosen).of(side))
        most = max(side.ndim for side in sides)
        then, otherwise = (side if side.ndim == most else side.unsqueeze(-1) for side in sides)
        lanes = self._tensor(condition)
        return torch.where(lanes.reshape(lanes.shape + (1,) * (most - 3)), then, otherwise)

    def _total(self, node: ir.Total) -> Tensor:
        low, high = self._integers(node.low), self._integers(node.high)
        alive = self._alive(node.low) & self._alive(node.high) & (low < high)
        if not alive.any():
            return self._constant(NEUTRAL[node.op])
        first = int(np.where(alive, low, np.iinfo(np.int64).max).min())
        last = int(np.where(alive, high, np.iinfo(np.int64).min).max())
        low, high = (np.where(alive, end, first) for end in (low, high))
        always = isinstance(node.condition, ir.Truth) and node.condition.value
        if node.op == "sum" and always and not {"q", "k"} & reads(node.body):
            return self._difference(node, low, high, first, last)
        return self._loop(node, low, high, first, last)

    def _difference(self, node: ir.Total, low: Int64, high: Int64, first: int, last: int) -> Tensor:
        """A sum whose terms depend on its variable alone: a difference of sums from the first term on, in fp64."""
        block, rows = self._block, np.arange(first, last)
        heads = len(block.heads) if "head" in reads(node.body) else 1
        alive = np.ones((heads, len(rows), 1), dtype=np.bool_)
        inner = Values(
            replace(self._operands, dtype=torch.float64),
            replace(block, rows=rows, keys=block.keys[:1], alive=alive, running=True),
        )
        terms = inner.of(substitute_value(node.body, {node.var: fold.place("q")}))
        terms = terms.expand(heads, len(rows), 1)[..., 0]
        ends = self._tensor(low - first), self._tensor(high - first)
        return _ranges(terms, *ends).to(self._operands.dtype)

    def _loop(self, node: ir.Total, low: Int64, high: Int64, first: int, last: int) -> Tensor:
        result = self._constant(NEUTRAL[node.op])
        for i in range(first, last):
            at: dict[ir.Index, ir.Index] = {node.var: fold.const(i)}
            inside = (low <= i) & (i < high)
            condition = substitute(node.condition, at)
            inside = inside & (self._over(self._block.alive & inside)._integers(condition) != 0)
            term = self._over(self._block.alive & inside).of(substitute_value(node.body, at))
            lanes = self._tensor(inside)
            lanes = lanes.reshape(lanes.shape + (1,) * (term.ndim - 3))
            if result.ndim < term.ndim:
                result = result.unsqueeze(-1)
            result = torch.where(lanes, FUNCTIONS[_JOINED[node.op]](result, term), result)
        return result


SCALES = (0.0, 1e3, 1e9, 1e15)
"""Terms between these sizes are added up apart, so that a large one takes no digits from ranges that it is not in."""


def _ranges(terms: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Sums of `terms` (heads, n) over ranges (heads or 1, rows, keys), low <= high."""
    head = torch.arange(len(terms), device=terms.device)[:, None, None]

    def between(values: Tensor) -> Tensor:
        sums = F.pad(values.cumsum(1), (1, 0))
        return sums[head, high] - sums[head, low]

    finite, size = terms.isfinite(), terms.detach().abs()
    total = between(torch.where(finite & (size <= SCALES[1]), terms, 0))
    for least, most in pairwise((*SCALES[1:], torch.inf)):
        here = finite & (size > least) & (size <= most)
        if here.any():
            total = total + between(torch.where(here, terms, 0))
    for value in (torch.inf, -torch.inf):
        if (terms == value).any():
            total = torch.where(between((terms == value).double()) > 0, total + value, total)
    return torch.where(between(terms.isnan().double()) > 0, torch.nan, total) if terms.isnan().any() else total


def _gathered(tensor: Tensor, indices: list[Tensor]) -> Tensor:
    """`tensor[indices]`. Its gradient is added up in one order, which that of indexing is not."""
    sizes = tensor.shape[: len(indices)]
    at = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for index, size in zip(indices, sizes, strict=True):
        at = at * size + index
    rows = tensor.reshape(-1, *tensor.shape[len(indices) :])
    return rows.index_select(0, at.reshape(-1)).reshape(*at.shape, *rows.shape[1:])


# --- functions -------------------------------------------------------------------------------------------------------

NEUTRAL = {"sum": 0.0, "min": torch.inf, "max": -torch.inf}
"""The aggregates of nothing."""

_JOINED = {"sum": "add", "min": "min", "max": "max"}


def _larger(*operands: Tensor) -> Tensor:
    """The largest; of equal ones the first, which has all of the gradient."""
    result = operands[0]
    for other in operands[1:]:
        result = torch.where((result >= other) | result.isnan(), result, other)
    return result


def _smaller(*operands: Tensor) -> Tensor:
    result = operands[0]
    for other in operands[1:]:
        result = torch.where((result <= other) | result.isnan(), result, other)
    return result


def _normalised(x: Tensor) -> Tensor:
    """x / ‖x‖, 0 for 0."""
    return _over(x, x.square().sum(-1, keepdim=True))


def _rms(x: Tensor) -> Tensor:
    """x / √mean(x²), 0 for 0."""
    return _over(x, x.square().mean(-1, keepdim=True))


def _over(x: Tensor, square: Tensor) -> Tensor:
    zero = square == 0
    return x * torch.rsqrt(square.masked_fill(zero, 1)).masked_fill(zero, 0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The inner product over the last dimension; a matrix product where one side has no rows, the other no keys."""
    for a, b in ((left, right), (right, left)):
        if a.shape[2] == 1 and b.shape[1] == 1:
            return a[:, :, 0] @ b[:, 0].transpose(-1, -2)
    return (left * right).sum(-1)


FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "pow": torch.pow,
    "abs": torch.abs,
    "min": _smaller,
    "max": _larger,
    "clamp": lambda x, low, high: _smaller(_larger(x, low), high),
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "log": torch.log,
    "log2": torch.log2,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "relu": torch.relu,
    "elu": F.elu,
    "silu": F.silu,
    "sin": torch.sin,
    "cos": torch.cos,
    "logaddexp": torch.logaddexp,
    "normalised": _normalised,
    "rms": _rms,
}
"""The functions of `ir.Apply`."""
