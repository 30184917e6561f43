"""Floating-point values of the IR as torch tensors, over blocks of pairs: what scores, weights and values are made of.

Everything is differentiable in q, k, v and the real inputs. Lanes that nobody sees hold finite numbers that depend on
nothing, so that they poison no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import fold, ir
from attnc.compiler.analysis import exact_evaluation
from attnc.compiler.analysis.array_evaluator import WORD
from attnc.compiler.analysis.intervals import fits_word
from attnc.compiler.lowering.specialise import specialise
from attnc.compiler.rewrite import substitute_value, variables
from attnc.compiler.value_nodes import is_own, rank, reads
from attnc.runtime import scaled
from attnc.runtime.asking import surely_all
from attnc.runtime.device_constants import on_device
from attnc.runtime.functions import FUNCTIONS
from attnc.runtime.pair_blocks import NO_LOOPS, Alive, Int64, Loops, Operands, PairBlock
from attnc.runtime.scaled import Quantity, ScaledTensor, plain
from attnc.runtime.sums import added_up, conjugate_gradients, covered, gathered, numbered, ranges, taken
from attnc.runtime.table_products import TableReads, looked_up, product
from attnc.runtime.widths import Widths
from attnc.spec.errors import EvaluationError

S = TypeVar("S", np.int64, np.float64, np.bool_)


@dataclass(frozen=True)
class _BlockLanes:
    """Rows and keys, the values of variables, and what is asked for, of one head."""

    places: tuple[Int64, Int64]
    bound: Mapping[ir.Var, Int64]
    alive: Alive
    counts: tuple[int, int]

    def fits(self, node: ir.Index) -> bool:
        """Whether 64 bits are enough for an exact expression, its constants included."""
        if not all(map(_is_word, node.below)):
            return False
        limits = {v: (int(x.min(initial=0)), int(x.max(initial=0))) for v, x in self.bound.items()}
        return fits_word(node, (0, self.counts[0]), (0, self.counts[1]), limits)


def _is_word(node: ir.Index) -> bool:
    """Whether the constants of a node, not below it, fit in 64 bits."""
    match node:
        case ir.Const():
            return abs(node.value) < WORD
        case ir.Linear():
            return all(abs(n) < WORD for n in (node.constant, *(factor for _, factor in node.terms)))
        case ir.TableRead():
            return all(abs(n) < WORD for n in node.values)
        case _:
            return True


_HEAD = ir.intern(ir.Var("a head", 0))
_ENTRY = ir.intern(ir.Var("a batch entry", 0))

AT_ONCE = 1 << 23
"""Terms of an aggregate that are computed at once, over all lanes."""


class BlockValues:
    """Values over one block: tensors (…, heads or 1, rows or 1, keys or 1), for vectors with dimensions more.

    In front is a dimension for each loop that the values stand in.
    """

    def __init__(
        self,
        operands: Operands,
        block: PairBlock,
        vectors: Mapping[str, Tensor] | None = None,
        loops: Loops = NO_LOOPS,
        outer: BlockValues | None = None,
        known: Mapping[ir.Value, Tensor] | None = None,
    ) -> None:
        """`vectors`: those of the block's rows, (heads, rows, 1, dk), and keys, where they are at hand.

        `known`: values that are known already, over all pairs of the block.
        """
        self._operands = operands
        self._block = block
        self._vectors = vectors or {}
        self._loops = loops
        self._outer = outer
        self._known: dict[ir.Value, Quantity] = dict(known or {})

    def _over(self, alive: Alive) -> BlockValues:
        """The same over fewer pairs."""
        return BlockValues(self._operands, replace(self._block, alive=alive), self._vectors, self._loops, self)

    def of(self, node: ir.Value) -> Tensor:
        """The value. Raises EvaluationError where an index or an exact part faults for a pair that is asked for."""
        return plain(self.quantity(node))

    def quantity(self, node: ir.Value) -> Quantity:
        """The value, perhaps with exponents of its own."""
        found = self._known.get(node)
        if found is None:
            found = self._remembered(node)
            found = self._known[node] = self._of(node) if found is None else self._narrowed(node, found)
        return found

    def _remembered(self, node: ir.Value) -> Quantity | None:
        """What was known before fewer pairs were asked for."""
        values = self._outer
        while values is not None and values._loops is self._loops:
            if node in values._known:
                return values._known[node]
            values = values._outer
        return None

    def _narrowed(self, node: ir.Value, found: Quantity) -> Quantity:
        """The value with 1 in lanes that nobody asks for any more: what follows there has no gradient."""
        if not (found.mantissa if isinstance(found, ScaledTensor) else found).requires_grad:
            return found
        alive = self._alive(node)
        if alive.all():
            return found
        lanes = _broad(self._tensor(alive), rank(node))
        return _changed(found, lambda x: torch.where(lanes, x, torch.ones((), dtype=x.dtype, device=x.device)))

    def where(self, condition: ir.Index) -> tuple[BlockValues, Tensor]:
        """The same over the pairs for which a condition holds, and which these are."""
        holds = self.holds(condition)
        if isinstance(condition, ir.Truth) and condition.value:
            return self, self._tensor(holds)  # what is known here stays known
        return self._over(self._lanes(self._block.alive) & holds), self._tensor(holds)

    def holds(self, condition: ir.Index) -> Alive:
        """Where a condition holds: (heads or 1, rows or 1, keys or 1)."""
        if not ir.is_truth(condition):
            return np.asarray(self._integers(condition) != 0)

        def evaluate(own: ir.Index, lanes: _BlockLanes) -> Alive:
            origins = self._operands.origins
            return exact_evaluation.truths_in(
                own, *lanes.places, lanes.bound, lanes.alive, origins, wide=not lanes.fits(own)
            )

        return self._by_head(condition, evaluate)

    def integer(self, node: ir.Index) -> int:
        """A number that is the same for all lanes."""
        return int(self._integers(node).flat[0])

    def looped(self, variable: ir.Var, low: int, high: int) -> BlockValues:
        """The same in a loop."""
        steps = np.arange(low, high).reshape(-1, *[1] * self._dims)
        return BlockValues(self._operands, self._block, self._vectors, self._loops.inside(variable, steps), self)

    def logit(self, node: ir.Value) -> Tensor:
        """The logarithm of what an extra logit, or a vector of them, adds: (heads or 1, rows)."""
        value = self.of(node)
        return (value if value.ndim == 3 else torch.logsumexp(value, -1))[..., 0]

    def weighted(self, weights: Quantity, node: ir.Value) -> Quantity:
        """Σ weights · value over the keys: (…, heads or 1, rows or 1, 1[, width])."""
        value = self.quantity(node)
        extra = rank(node)
        factors = [_widened(weights, extra), value]
        return scaled.contracted(factors, _broad(self.seen(), extra), -1 - extra, extra)

    def seen(self) -> Tensor:
        """Which pairs are visible: (…, heads or 1, rows, keys)."""
        return self._tensor(self._lanes(self._seen()))

    def _seen(self) -> Alive:
        assert self._block.seen is not None
        return self._block.seen

    # --- lanes ---

    @property
    def _dims(self) -> int:
        """Dimensions of lanes."""
        return 3 + self._loops.depth

    def _lanes(self, alive: Alive) -> Alive:
        """With a dimension for every loop."""
        return alive.reshape((1,) * (self._dims - alive.ndim) + alive.shape)

    def _rank(self, value: Quantity) -> int:
        """Dimensions of a value beyond its lanes."""
        return (value.mantissa if isinstance(value, ScaledTensor) else value).ndim - self._dims

    def _axes(self, node: ir.Value | ir.Index) -> tuple[bool, ...]:
        """Which dimensions of lanes a node depends on."""
        read = reads(node)
        axes = [False] * self._loops.depth + [self._differs_by_head(read), "q" in read, "k" in read]
        for value in self._loops.of(node).values():
            axes = [a or n > 1 for a, n in zip(axes, value.shape, strict=True)]
        return tuple(axes)

    def _differs_by_head(self, read: frozenset[str]) -> bool:
        """Whether what reads this depends on the head of the block: also by its batch entry, if heads tell that."""
        return "head" in read or (self._operands.entry_heads is not None and "batch" in read)

    def _alive(self, node: ir.Value | ir.Index) -> Alive:
        """The lanes that are asked for, over the dimensions that a node reads."""
        unread = tuple(i for i, read in enumerate(self._axes(node)) if not read)
        return np.asarray(self._lanes(self._block.alive).any(axis=unread, keepdims=True))

    def _constant(self, value: float) -> Tensor:
        shape = (1,) * self._dims
        return torch.full(shape, value, dtype=self._operands.dtype, device=self._operands.device)

    def _tensor(self, array: NDArray[np.int64 | np.bool_]) -> Tensor:
        return on_device(array, self._operands.device)

    # --- nodes ---

    def _of(self, node: ir.Value) -> Quantity:  # noqa: C901  one case a node kind
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
                return self._dot(node)
            case ir.FloatSelect():
                return self._select(node)
            case ir.ValueReduce():
                return self._total(node)
            case ir.VisibleReduce():
                return self._over_keys(node)
            case _:
                return self._of_vectors(node)

    def _of_vectors(
        self,
        node: ir.Pick
        | ir.VectorPart
        | ir.Outer
        | ir.Eye
        | ir.Solve
        | ir.Contract
        | ir.Diagonal
        | ir.StateAt
        | ir.Ranking,
    ) -> Tensor:
        match node:
            case ir.Pick():
                return self._pick(node)
            case ir.VectorPart():
                return self._part(node)
            case ir.Outer():
                return self.of(node.left)[..., :, None] * self.of(node.right)[..., None, :]
            case ir.Eye():
                size = self.integer(node.size)
                eye = torch.eye(size, dtype=self._operands.dtype, device=self._operands.device)
                return eye.reshape((1,) * self._dims + (size, size))
            case ir.Solve():
                return self._solve(node)
            case _:
                raise AssertionError(f"{type(node).__name__} in a pattern")

    def _solve(self, node: ir.Solve) -> Tensor:
        matrix, vector = self.of(node.matrix), self.of(node.vector)
        alive = self._alive(node)
        if not alive.all():
            one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
            matrix = torch.where(_broad(self._tensor(alive), 2), matrix, one)
        lanes = np.broadcast_shapes(matrix.shape[:-2], vector.shape[:-1])
        vector = vector.expand(*lanes, vector.shape[-1])
        if node.steps is not None:
            return conjugate_gradients(matrix, vector, node.steps)
        solved: Tensor
        solved, singular = torch.linalg.solve_ex(matrix.expand(*lanes, *matrix.shape[-2:]), vector[..., None])
        if singular.any():
            help_ = "add something to its diagonal: `… + 0.01 * eye(dk)`"
            raise EvaluationError("A901", "`solve` of a matrix that is singular", None, help_)
        return solved[..., 0]

    # --- exact parts ---

    def _integers(self, node: ir.Index) -> Int64:
        """An integer, or a condition as 0 and 1, over the dimensions that it reads; dead lanes hold anything."""

        def evaluate(own: ir.Index, lanes: _BlockLanes) -> Int64:
            origins = self._operands.origins
            return exact_evaluation.integers_in(
                own, *lanes.places, lanes.bound, lanes.alive, origins, wide=not lanes.fits(own)
            )

        return self._by_head(node, evaluate)

    def _floats(self, node: ir.Index) -> NDArray[np.float64]:
        """An integer in binary64, also where it passes 64 bits."""

        def evaluate(own: ir.Index, lanes: _BlockLanes) -> NDArray[np.float64]:
            return exact_evaluation.floats_in(
                own, *lanes.places, lanes.bound, lanes.alive, lanes.fits, self._operands.origins
            )

        return self._by_head(node, evaluate)

    def _by_head(self, node: ir.Index, evaluate: Callable[[ir.Index, _BlockLanes], NDArray[S]]) -> NDArray[S]:
        """An exact expression for each head that it differs for: at once, unless it is tabulated for each."""
        block, axes = self._block, self._axes(node)
        alive, bound = self._alive(node), self._loops.of(node)
        places = block.rows if axes[-2] else block.rows[:1], block.keys if axes[-1] else block.keys[:1]
        counts = block.window.n_q, block.window.n_k
        heads = np.array(block.heads if axes[-3] else block.heads[:1])
        parts = []
        for at in self._evaluated_at_once(node, heads):
            here, own = _of_heads(alive, at), {v: _of_heads(x, at) for v, x in bound.items()}
            entry, head = self._entries_and_heads(heads[at])
            if at.stop - at.start == 1:
                own = {v: x[..., 0, :, :] for v, x in own.items()}
                lanes = _BlockLanes(places, own, here[..., 0, :, :], counts)
                parts.append(evaluate(self._specialised(node, int(entry[0]), int(head[0])), lanes)[..., None, :, :])
                continue
            own |= {_HEAD: head[:, None, None], _ENTRY: entry[:, None, None]}
            one_entry = int(entry[0]) if entry[0] == entry[-1] else _ENTRY
            found = evaluate(self._specialised(node, one_entry, _HEAD), _BlockLanes(places, own, here, counts))
            shape = np.broadcast_shapes(found.shape, (len(head), 1, 1))
            parts.append(found if found.shape == shape else np.array(np.broadcast_to(found, shape)))
        return np.concatenate(parts, -3) if len(parts) > 1 else parts[0]

    def _evaluated_at_once(self, node: ir.Index, heads: Int64) -> list[slice]:
        """Heads of the block that share one evaluation of an exact expression."""
        if any(isinstance(below, ir.RoundToInt) for below in node.below):  # it is tabulated for each head
            return [slice(i, i + 1) for i in range(len(heads))]
        return [slice(0, len(heads))]

    def _entries_and_heads(self, heads: Int64) -> tuple[Int64, Int64]:
        """The batch entry of each head of the block, and which of the entry's heads each is."""
        size, first = self._operands.entry_heads, self._block.batch
        return (np.full_like(heads, first), heads) if size is None else (first + heads // size, heads % size)

    def _specialised(self, node: ir.Index, entry: int | ir.Var, head: int | ir.Var) -> ir.Index:
        block, operands = self._block, self._operands
        name = (node, block.place, entry, head)
        found = operands.specialised.get(name)
        if found is None:
            how = {"batch": entry, "head": head, "group": operands.group}
            found = specialise(node, operands.sizes, operands.slices, block.place, **how)  # type: ignore[arg-type]
            operands.specialised[name] = found
        return found

    def _ratio(self, node: ir.Ratio) -> Tensor:
        num, den = self._floats(node.num), self._floats(node.den)
        alive = self._alive(node.num) & self._alive(node.den)
        if (self._alive(node) & (den == 0)).any():
            raise EvaluationError("A901", "division by zero", None, "test the divisor first: `… if n != 0 else …`")
        exactly = np.where(alive, num, 1) / np.where(alive & (den != 0), den, 1)
        return on_device(exactly, self._operands.device, self._operands.dtype)

    # --- leaves ---

    def _vector(self, node: ir.Vec) -> Tensor:
        block, operands = self._block, self._operands
        if not is_own(node) or (operands.spaced and node.tensor != "q"):
            return self._vector_at(node)
        front = (None,) * self._loops.depth
        if node.tensor in self._vectors:
            return self._vectors[node.tensor][front]
        heads = np.asarray(block.heads, dtype=np.int64)
        if node.tensor == "q":
            rows = taken(operands.q[block.batch], heads, block.rows + block.window.row)
            return rows.to(operands.dtype)[:, :, None][front]
        tensor = operands.k if node.tensor == "k" else operands.v
        keys = taken(tensor[block.batch], heads // operands.group, block.keys + block.window.key)
        return keys.to(operands.dtype)[:, None][front]

    def _vector_at(self, node: ir.Vec) -> Tensor:
        """The vectors at positions, of heads that may be computed too; zeros outside of the tokens."""
        operands, window = self._operands, self._block.window
        tensor = {"q": operands.q, "k": operands.k, "v": operands.v}[node.tensor][self._block.batch]
        at, alive = self._integers(node.at), self._alive(node.at)
        heads = self._integers(node.head)
        if operands.entry_heads is not None:
            own = np.array(self._block.heads)[:, None, None]
            heads = heads + (own - own % operands.entry_heads)
        if node.tensor == "q":
            low, first, count = window.shift, window.row - window.shift, window.n_q
        else:
            low, first, count = 0, window.key, operands.k[0].shape[1] if operands.spaced else window.n_k
            heads = heads // operands.group
        nothing = alive & (at == ir.OUTSIDE)
        outside = alive & ~nothing & ((at < low) | (at >= low + count))
        if outside.any():
            number = int(np.broadcast_to(at, outside.shape)[outside][0])
            message = f"`{node.tensor}` is read at a position without a token, {number}"
            raise EvaluationError("A902", message, None, "test the position first: `… if 0 <= i < n else …`")
        index = np.clip(at + first, 0, max(tensor.shape[1] - 1, 0))
        found = gathered(tensor.to(operands.dtype), [self._tensor(heads), self._tensor(index)])
        if not nothing.any():
            return found
        return torch.where(
            self._tensor(nothing)[..., None], torch.zeros((), dtype=found.dtype, device=found.device), found
        )

    def _element(self, node: ir.Element) -> Tensor:
        tensor = self._operands.inputs[node.tensor.name].to(self._operands.dtype)
        if not node.indices:
            return tensor[(None,) * self._dims]
        places = self._places(node)
        value = gathered(tensor, [self._tensor(index) for index in places.indices])
        if places.alive.all():
            return value
        lanes = _broad(self._tensor(places.alive), value.ndim - self._dims)
        return torch.where(lanes, value, torch.ones((), dtype=value.dtype, device=value.device))

    def _places(self, node: ir.Element) -> TableReads:
        """Which entries of a real input are read; in lanes that nobody asks for, any."""
        shape = self._operands.inputs[node.tensor.name].shape
        found: list[Int64] = []
        alive = np.ones((1,) * self._dims, dtype=np.bool_)
        for axis, (index, dim) in enumerate(zip(node.indices, node.tensor.dims, strict=False)):
            low, size, offset = self._range(dim, shape[axis])
            here, values = self._alive(index), self._integers(index)
            outside = here & ((values < low) | (values >= low + size))
            if outside.any() and dim != "batch":
                name = dim if isinstance(dim, str) else "this"
                message = (
                    f"`{node.tensor.name}` is read at {int(np.broadcast_to(values, outside.shape)[outside][0])}; the "
                    f"`{name}` dimension has {low} to {low + size - 1}"
                )
                at_text = self._operands.origins.get(index)
                raise EvaluationError("A902", message, at_text, "test the index first: `… if 0 <= i < n else …`")
            at = np.zeros_like(values) if dim == "batch" and shape[axis] == 1 else values + offset
            found.append(np.clip(at, 0, max(shape[axis] - 1, 0)))
            alive = alive & here
        return TableReads(found, alive)

    def _range(self, dim: str | int, size: int) -> tuple[int, int, int]:
        """The first index of a dimension, how many there are, and what makes an index an entry of the tensor."""
        window = self._block.window
        match dim:
            case "token" | "key":
                return (0, size, 0) if self._operands.spaced else (0, window.n_k, window.key)
            case "query":
                return window.shift, window.n_q, window.row - window.shift
            case _:
                return 0, size, 0

    # --- inner products ---

    def _dot(self, node: ir.Dot) -> Tensor:
        for table, vector in ((node.left, node.right), (node.right, node.left)):
            if self._operands.looks_up and isinstance(table, ir.Element) and self._chooses(table, vector):
                tensor = self._operands.inputs[table.tensor.name].to(self._operands.dtype)
                found = looked_up(tensor, self._places(table), self.of(vector))
                if found is not None:
                    return found
        return product(self.of(node.left), self.of(node.right))

    def _chooses(self, table: ir.Element, vector: ir.Value) -> bool:
        """Whether one vector meets several of a table."""
        return any(a and not b for a, b in zip(self._axes(table), self._axes(vector), strict=True))

    # --- functions ---

    def _apply(self, node: ir.Apply) -> Quantity:
        operands = [self.quantity(operand) for operand in node.operands]
        most = max(map(self._rank, operands))
        aligned = [_widened(operand, most - self._rank(operand)) for operand in operands]
        if node.op in UNBOUNDED:
            aligned = self._calmed(node, aligned, most)
        found = None if node.op in _EXPONENTIAL and not self._operands.exponents else _scaled(node, aligned)
        return FUNCTIONS[node.op](*map(plain, aligned)) if found is None else found

    def _calmed(self, node: ir.Apply, operands: list[Quantity], extra: int) -> list[Quantity]:
        """Operands that are 1 in lanes that nobody asks for, where the derivative might be no number."""
        alive = self._alive(node)
        if alive.all():
            return operands
        lanes = _broad(self._tensor(alive), extra)
        at = UNBOUNDED[node.op]
        one = torch.ones((), dtype=self._operands.dtype, device=lanes.device)
        calm = _changed(operands[at], lambda x: torch.where(lanes, x, one))
        return [*operands[:at], calm, *operands[at + 1 :]]

    def _where_asked(self, node: ir.Value, value: Quantity) -> Quantity:
        """An extreme, which may be one of nothing, as 0 in lanes that nobody asks for."""
        alive = self._alive(node)
        if alive.all():
            return value
        lanes = _broad(self._tensor(alive), rank(node))
        found = plain(value)
        return torch.where(lanes, found, torch.zeros((), dtype=found.dtype, device=lanes.device))

    def _pick(self, node: ir.Pick) -> Tensor:
        """Entries of vectors at computed places."""
        vector, index = self.of(node.vector), self._integers(node.index)
        own, size = rank(node.vector), vector.shape[-rank(node.vector)]
        outside = self._alive(node.index) & ((index < 0) | (index >= size))
        if outside.any():
            number = int(np.broadcast_to(index, outside.shape)[outside][0])
            message = f"entry {number} of a vector of {size}"
            raise EvaluationError("A902", message, None, "test the index first: `… if i < n else …`")
        at = self._tensor(np.clip(index, 0, size - 1))
        front = vector.movedim(-own, -1)
        lanes = front.shape[: self._dims]
        moved = [i for i in range(self._dims) if at.shape[i] > 1]
        if len(moved) == 1 and lanes[moved[0]] == 1:  # one dimension of lanes runs over the entries
            return front.index_select(-1, at.reshape(-1)).transpose(-1, moved[0]).squeeze(-1)
        shape = np.broadcast_shapes(lanes, at.shape)
        at = at.reshape(at.shape + (1,) * own).expand(*shape, *front.shape[self._dims : -1], 1)
        return front.expand(*shape, *front.shape[self._dims :]).gather(-1, at).squeeze(-1)

    def _part(self, node: ir.VectorPart) -> Tensor:
        vector = self.of(node.vector)
        if vector.shape[-1] % node.of:
            message = f"a vector of {vector.shape[-1]} entries has no {node.of} equal parts"
            raise EvaluationError("A904", message, None, f"give a size that {node.of} divides")
        size = vector.shape[-1] // node.of
        return vector[..., node.number * size : (node.number + 1) * size]

    def _select(self, node: ir.FloatSelect) -> Quantity:
        """Each side over the lanes that take it alone."""
        condition = self.holds(node.condition)
        alive = self._lanes(self._block.alive)
        sides = [
            self._over(alive & chosen).quantity(side)
            for chosen, side in ((condition, node.then), (~condition, node.otherwise))
        ]
        most = max(map(self._rank, sides))
        then, otherwise = (_widened(side, most - self._rank(side)) for side in sides)
        return scaled.chosen(_broad(self._tensor(condition), most), then, otherwise)

    # --- aggregates over keys ---

    def _over_keys(self, node: ir.VisibleReduce) -> Quantity:
        """Over the keys of each row; outside of the loops that it does not depend on, where it may be known."""
        outer = self._outer
        if outer is not None and outer._loops is self._loops:
            try:
                return outer.quantity(node)
            except EvaluationError:  # perhaps only in rows that nobody asks for here
                return self._over_own_keys(node)
        if outer is not None and not self._loops.of(node):
            return _in_front(outer.quantity(node), 1)
        return self._over_own_keys(node)

    def _over_own_keys(self, node: ir.VisibleReduce) -> Quantity:
        """Over the keys of the rows that are asked for."""
        seen = self._lanes(self._seen()) & self._lanes(self._block.alive).any(-1, keepdims=True)
        values = self._over(seen)
        if not (isinstance(node.condition, ir.Truth) and node.condition.value):
            seen = seen & values.holds(node.condition)
            values = self._over(seen)
        found = _aggregated(values, node.op, node.body, seen, -1)
        return found if node.op == "sum" else self._where_asked(node, found)

    # --- aggregates over ranges ---

    def _total(self, node: ir.ValueReduce) -> Quantity:
        found = self._over_range(node)
        return found if node.op == "sum" else self._where_asked(node, found)

    def _over_range(self, node: ir.ValueReduce) -> Quantity:
        low, high = self._integers(node.low), self._integers(node.high)
        alive = self._alive(node.low) & self._alive(node.high) & (low < high)
        if not alive.any():
            return self._nothing(node)
        first = int(np.where(alive, low, np.iinfo(np.int64).max).min())
        last = int(np.where(alive, high, np.iinfo(np.int64).min).max())
        low, high = (np.where(alive, end, first) for end in (low, high))
        if self._is_sum_of_terms(node, low, high):
            return self._difference(node, low, high, first, last)
        apart = self._of_ranges_apart(node, low, high, first, last)
        if apart is not None:
            return apart
        shared = self._shared(node, low, high)
        if shared is not None:
            return shared
        return self._looped(node, low, high)

    def _nothing(self, node: ir.ValueReduce | ir.VisibleReduce) -> Tensor:
        """The aggregate of nothing."""
        value = self._constant(NEUTRAL[node.op])
        return _broad(value, rank(node)).expand(*value.shape, *self._widths(node.body))

    def _widths(self, node: ir.Value) -> tuple[int, ...]:
        """The sizes of a vector or matrix, without its value."""
        own = self._operands
        vectors = {name: x[0].shape[-1] for name, x in (("q", own.q), ("k", own.k), ("v", own.v)) if len(x)}
        return Widths(vectors, {name: x.shape for name, x in own.inputs.items()}, self.integer).of(node)

    def _is_sum_of_terms(self, node: ir.ValueReduce, low: Int64, high: Int64) -> bool:
        """Whether it is a sum of numbers that depend on its variable alone, over ranges of each lane's own."""
        always = isinstance(node.condition, ir.Truth) and node.condition.value
        if node.op != "sum" or not always or rank(node) or self._loops.depth or {"q", "k"} & reads(node.body):
            return False
        terms = max(low.size, high.size) * int((high - low).max())
        large = any(isinstance(below, ir.Apply) and below.op == "exp" for below in node.body.below)
        return max(low.size, high.size) > 1 and not (large and terms <= AT_ONCE)

    def _difference(self, node: ir.ValueReduce, low: Int64, high: Int64, first: int, last: int) -> Tensor:
        """A sum whose terms depend on its variable alone: a difference of sums from the first term on, in fp64."""
        block, rows = self._block, np.arange(first, last)
        heads = len(block.heads) if self._differs_by_head(reads(node.body)) else 1
        asked = np.ones(len(rows), np.bool_) if isinstance(node.body, ir.Element) else covered(low, high, first, last)
        alive = np.broadcast_to(asked[None, :, None], (heads, len(rows), 1))
        inner = BlockValues(
            replace(self._operands, dtype=torch.float64),
            replace(block, rows=rows, keys=block.keys[:1], alive=alive, running=True, seen=None),
        )
        terms = inner.of(substitute_value(node.body, {node.var: fold.place("q")}))
        terms = terms.expand(heads, len(rows), 1)[..., 0]
        ends = self._tensor(low - first), self._tensor(high - first)
        return ranges(terms, *ends).to(self._operands.dtype)

    def _of_ranges_apart(self, node: ir.ValueReduce, low: Int64, high: Int64, first: int, last: int) -> Tensor | None:
        """A sum whose terms depend on its variable alone, over ranges that are apart: each term is added once."""
        always = isinstance(node.condition, ir.Truth) and node.condition.value
        large = any(
            isinstance(b, ir.VisibleReduce) or (isinstance(b, ir.Apply) and b.op == "exp") for b in node.body.below
        )
        if node.op != "sum" or not always or large or self._loops.depth or {"q", "k"} & reads(node.body):
            return None
        low, high = np.broadcast_arrays(low, high)
        lanes, count = low.shape, prod(low.shape[1:])
        if count * int((high - low).max()) <= 2 * (last - first):
            return None
        pairs = zip(low.reshape(-1, count), high.reshape(-1, count), strict=True)
        numbers = [own for own in (numbered(a, b, first, last) for a, b in pairs) if own is not None]
        if len(numbers) < len(low):
            return None
        block, rows = self._block, np.arange(first, last)
        heads = len(block.heads) if self._differs_by_head(reads(node.body)) else 1
        alive = np.any([own < count for own in numbers], 0)
        alive = np.broadcast_to(alive[None, :, None], (heads, len(rows), 1))
        here = replace(block, rows=rows, keys=block.keys[:1], alive=alive, running=True, seen=None)
        terms = BlockValues(self._operands, here).of(substitute_value(node.body, {node.var: fold.place("q")}))[:, :, 0]
        terms = terms.expand(max(heads, lanes[0]), *terms.shape[1:])
        terms = torch.where(_broad(self._tensor(alive[..., 0]), rank(node)), terms, 0)
        found = added_up(terms, self._tensor(np.array(numbers)), count)
        return found.reshape(len(found), *lanes[1:], *terms.shape[2:])

    def _shared(self, node: ir.ValueReduce, low: Int64, high: Int64) -> Quantity | None:
        """The aggregate of a unit once for all of its rows, or keys, where its ends alone depend on these."""
        if self._loops.depth or any(isinstance(below, ir.VisibleReduce) for below in node.body.below):
            return None
        inside = reads(node.body) | reads(node.condition)
        for axis, name in ((-1, "k"), (-2, "q")):
            if name in inside or max(low.shape[axis], high.shape[axis]) < 2:
                continue
            ends = np.concatenate([_columns(end, axis) for end in np.broadcast_arrays(low, high)])
            _, chosen, number = np.unique(ends, axis=1, return_index=True, return_inverse=True)
            if len(chosen) < ends.shape[1]:
                value = self._of_chosen(axis, chosen, number.reshape(-1))._looped_of(node)
                return _selected(value, axis, self._tensor(number.reshape(-1)))
        return None

    def _of_chosen(self, axis: int, chosen: Int64, number: Int64) -> BlockValues:
        """The same over some of the rows or keys, each of which stands for all of its number."""
        block = self._block
        order = np.argsort(number, kind="stable")
        starts = np.searchsorted(number[order], np.arange(len(chosen)))
        alive = np.logical_or.reduceat(np.take(block.alive, order, axis), starts, axis)
        part = replace(block, alive=alive, seen=None)
        part = replace(part, keys=block.keys[chosen]) if axis == -1 else replace(part, rows=block.rows[chosen])
        kept = {name: x for name, x in self._vectors.items() if (name == "q") == (axis == -1)}
        return BlockValues(self._operands, part, kept)

    def _looped_of(self, node: ir.ValueReduce) -> Quantity:
        low, high = self._integers(node.low), self._integers(node.high)
        alive = self._alive(node.low) & self._alive(node.high) & (low < high)
        if not alive.any():
            return self._nothing(node)
        first = int(np.where(alive, low, np.iinfo(np.int64).max).min())
        return self._looped(node, *(np.where(alive, end, first) for end in (low, high)))

    def _looped(self, node: ir.ValueReduce, low: Int64, high: Int64) -> Quantity:
        """The aggregate with a dimension for its variable, in parts where that is too much at once."""
        count = int((high - low).max())
        step = max(1, AT_ONCE // max(self._size(node, low, high), 1))
        parts = [self._part_of(node, low, high, i, min(i + step, count)) for i in range(0, count, step)]
        return _joined(node.op, parts)

    def _size(self, node: ir.ValueReduce, low: Int64, high: Int64) -> int:
        """Entries of the largest factor of one term, over all lanes."""
        width = max(self._operands.q[0].shape[-1], 1)
        ends = np.broadcast_shapes(low.shape, high.shape)
        sizes = []
        for factor in _factors_of(node.body) if node.op == "sum" else [node.body]:
            sizes.append(self._lanes_of(factor, node.var, ends) * int(width ** max(rank(factor), 1)))
            if isinstance(factor, ir.Dot):  # a matrix product, where one side alone runs with the variable
                sides = [x for x in (factor.left, factor.right) if node.var in variables(cast("ir.Index", x))]
                if len(sides) == 1:
                    sizes[-1] = max(sizes[-1] // width, self._lanes_of(sides[0], node.var, ends) * width)
        return max(sizes)

    def _lanes_of(self, factor: ir.Value, variable: ir.Var, ends: tuple[int, ...]) -> int:
        """How many numbers or vectors a factor of a term is, over all lanes."""
        lanes = self._alive(factor).shape
        return prod(np.broadcast_shapes(lanes, ends) if variable in variables(cast("ir.Index", factor)) else lanes)

    def _part_of(self, node: ir.ValueReduce, low: Int64, high: Int64, start: int, stop: int) -> Quantity:
        """The aggregate over the terms `low + start` to `low + stop` of each lane."""
        steps = np.arange(start, stop).reshape(-1, *[1] * self._dims)
        loops = self._loops.inside(node.var, low[None] + steps)
        inside = self._alive(node)[None] & (steps < (high - low)[None])
        inner = BlockValues(self._operands, replace(self._block, alive=inside), self._vectors, loops, self)
        if not (isinstance(node.condition, ir.Truth) and node.condition.value):
            inside = inside & inner.holds(node.condition)
            inner = inner._over(inside)
        value = _aggregated(inner, node.op, node.body, inside, 0)
        return _without_front(value)


def _of_heads(lanes: NDArray[S], heads: slice) -> NDArray[S]:
    """Some of the heads of an array (…, heads or 1, rows, keys)."""
    return lanes if lanes.shape[-3] == 1 else lanes[..., heads, :, :]


def _aggregated(values: BlockValues, op: str, body: ir.Value, inside: Alive, axis: int) -> Quantity:
    """Over an axis of lanes where `inside`; the axis stays, of size 1."""
    extra = rank(body)
    at = axis - extra if axis < 0 else axis
    lanes = _broad(values._tensor(inside), extra)
    if op == "sum":
        factors = _factors(values, body, extra)
        return scaled.contracted(factors, _least(lanes, at), at, extra)
    value = values.of(body)
    neutral = torch.full((), NEUTRAL[op], dtype=value.dtype, device=value.device)
    value = torch.where(lanes, value, neutral)
    best = value.argmax(at, keepdim=True) if op == "max" else value.argmin(at, keepdim=True)
    return value.gather(at, best)


def _factors_of(node: ir.Value) -> list[ir.Value]:
    if isinstance(node, ir.Apply) and node.op == "mul":
        return [factor for operand in node.operands for factor in _factors_of(operand)]
    return [node.left, node.right] if isinstance(node, ir.Outer) else [node]


def _least(inside: Tensor, axis: int) -> Tensor:
    """`inside` without the other dimensions along which it is the same."""
    for i in range(inside.ndim):
        if i == axis % inside.ndim or inside.shape[i] == 1:
            continue
        first = inside.narrow(i, 0, 1)
        if surely_all(inside == first):
            inside = first
    return inside


def _factors(values: BlockValues, node: ir.Value, extra: int) -> list[Quantity]:
    """What a value is a product of, each with `extra` dimensions beyond lanes."""
    if isinstance(node, ir.Apply) and node.op == "mul":
        return [factor for operand in node.operands for factor in _factors(values, operand, extra)]
    if isinstance(node, ir.Outer):
        return [values.of(node.left)[..., :, None], values.of(node.right)[..., None, :]]
    return [_widened(values.quantity(node), extra - rank(node))]


UNBOUNDED = {"div": 1, "share": 1, "log": 0, "log2": 0, "sqrt": 0, "pow": 0, "normalised": 0, "rms": 0}
"""Functions with derivatives that are no number somewhere, and the operand that decides."""

NEUTRAL = {"sum": 0.0, "min": torch.inf, "max": -torch.inf}
"""The aggregates of nothing."""


def _joined(op: str, parts: Sequence[Quantity]) -> Quantity:
    result = parts[0]
    for part in parts[1:]:
        result = scaled.added(result, part) if op == "sum" else FUNCTIONS[op](plain(result), plain(part))
    return result


_EXPONENTIAL = ("exp", "softplus")
"""Functions whose values get exponents."""


def _scaled(node: ir.Apply, operands: Sequence[Quantity]) -> Quantity | None:
    """Operations that know exponents of their own; None for all others."""
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
            return scaled.divided(a, b, share=node.op == "share")
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


# --- shapes ----------------------------------------------------------------------------------------------------------


def _changed(value: Quantity, change: object) -> Quantity:
    """A value with its tensors changed."""
    assert callable(change)
    if isinstance(value, ScaledTensor):
        return ScaledTensor(change(value.mantissa), change(value.shift))
    return cast("Tensor", change(value))


def _widened(value: Quantity, dims: int) -> Quantity:
    """With so many dimensions more, behind."""
    return _changed(value, lambda x: x.reshape(x.shape + (1,) * dims)) if dims > 0 else value


def _broad(value: Tensor, dims: int) -> Tensor:
    """The same of a tensor."""
    return value.reshape(value.shape + (1,) * dims)


def _in_front(value: Quantity, dims: int) -> Quantity:
    return _changed(value, lambda x: x[(None,) * dims])


def _without_front(value: Quantity) -> Quantity:
    return _changed(value, lambda x: x.squeeze(0))


def _selected(value: Quantity, axis: int, index: Tensor) -> Quantity:
    """Rows or keys (axis -2 or -1 of lanes without loops) by number."""
    return _changed(value, lambda x: x.index_select(3 + axis, index) if x.shape[3 + axis] > 1 else x)


def _columns(array: Int64, axis: int) -> Int64:
    """All entries that belong to one place of an axis, below one another."""
    return np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
