"""Attention to blocks that inputs define: token numbers, sorted on their device, with tables as kernels read them.

The host never waits: there are as many blocks as numbers can be, and as many key tiles as can become necessary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attnc.compiler import ir
from attnc.compiler.analysis.heads import at_own_head
from attnc.compiler.ir import Index
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.selected.selected_problem import PairCondition, rest_text
from attnc.compiler.lowering.lower_attention import TOKENS
from attnc.compiler.lowering.specialise import CallSizes as SizesByName
from attnc.compiler.lowering.specialise import Slices, specialise
from attnc.compiler.planning.documents import whole
from attnc.compiler.planning.selected_keys import SelectedKeys
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.tensor_checks import TensorSizes, as_tensor, blank, call_shape
from attnc.runtime.executors.cpu.autograd import Pair, differentiable
from attnc.runtime.executors.cpu.selected_by_data import OwnBlocks, SelectedByData
from attnc.runtime.executors.selections.selection_groups import head_groups_of
from attnc.runtime.executors.triton.selected_lists import Tables
from attnc.runtime.executors.triton.selected_on_gpu import SelectedOnGpu
from attnc.runtime.planning.plans import Planner


@dataclass(frozen=True)
class Numbering:
    """The inputs of an expression over the queries, or the keys, of one head; `named`: sizes of the call."""

    inputs: Mapping[str, Tensor]
    sizes: TensorSizes
    named: Mapping[str, int]
    batch: int
    head: int
    shift: int
    device: torch.device

    def of(self, node: Index, place: str) -> Tensor:
        """Compute an integer for each query, or each key: int64 (N). Raises NotInKernelsError if not supported."""
        match node:
            case ir.Const(value=value):
                return torch.full((), value, dtype=torch.int64, device=self.device)
            case ir.Extent(name=name):
                return torch.full((), self._extent(name), dtype=torch.int64, device=self.device)
            case ir.Position():
                count, first = (self.sizes.n_q, self.shift) if place == "q" else (self.sizes.n_k, 0)
                return torch.arange(first, first + count, device=self.device)
            case ir.Linear(terms=terms, constant=constant):
                total = torch.full((), constant, dtype=torch.int64, device=self.device)
                for term, factor in terms:
                    total = total + self.of(term, place) * factor
                return total
            case ir.Arith(op=op, operands=operands) if op in _OPERATIONS:
                first_, *rest = (self.of(operand, place) for operand in operands)
                for other in rest:
                    first_ = _OPERATIONS[op](first_, other)
                return first_
            case ir.Lookup():
                return self._read(node, place)
            case _:
                raise NotInKernelsError("blocks that inputs do not define by token numbers")

    def bound(self, node: Index) -> int:
        """Return an exclusive upper bound of an expression's values, at least 0. Raises NotInKernelsError."""
        match node:
            case ir.Const(value=value):
                return value + 1
            case ir.Extent(name=name):
                return self._extent(name) + 1
            case ir.Position(name=name) if name == "k" or self.shift >= 0:
                return self.sizes.n_k if name == "k" else self.sizes.n_q + self.shift
            case ir.Arith(op="mod", operands=(_, divisor)):
                return self.bound(divisor) - 1
            case ir.Arith(op="floordiv", operands=(inner, divisor)):
                by = self.of(divisor, "q") if not isinstance(divisor, ir.Const) else divisor.value
                return (self.bound(inner) - 1) // max(self._number(divisor, by), 1) + 1
            case ir.Lookup(tensor=tensor) if tensor.made is not None and tensor.made.what == "ranks":
                return self.sizes.n_q if tensor.dims[-1] == "query" else self.sizes.n_k
            case _:
                raise NotInKernelsError("blocks without a bound by the sizes")

    def _number(self, node: Index, evaluated: Tensor | int) -> int:
        """Evaluate a number that depends on sizes alone."""
        if isinstance(evaluated, int):
            return evaluated
        if any(isinstance(subexpression, ir.Lookup | ir.Position) for subexpression in node.below):
            raise NotInKernelsError("blocks without a bound by the sizes")
        on_host = Numbering({}, self.sizes, self.named, 0, 0, 0, torch.device("cpu"))
        return int(on_host.of(node, "q"))

    def _extent(self, name: str) -> int:
        token_counts = {"queries": self.sizes.n_q, "keys": self.sizes.n_k, TOKENS: self.sizes.n_k}
        return token_counts[name] if name in token_counts else self.named[name]

    def _read(self, node: ir.Lookup, place: str) -> Tensor:
        """Read an input at the current batch entry and head, and at each token."""
        tensor, values = node.tensor, self.inputs[node.tensor.name].to(self.device)
        group = self.sizes.heads // max(self.sizes.kv_heads, 1)
        fixed_indices = {"batch": self.batch, "head": self.head, "kv_head": self.head // group}
        if len(node.indices) < len(tensor.dims) or not at_own_head(node, len(node.indices) - 1):
            raise NotInKernelsError("inputs read at another head")
        for dim in tensor.dims[:-1]:
            values = values[min(fixed_indices[str(dim)], len(values) - 1)]
        positions = self.of(node.indices[-1], place)
        if tensor.dims[-1] == "query":
            positions = positions - self.shift
        return values.long().index_select(0, positions.clamp(0, max(len(values) - 1, 0)).reshape(-1))


_OPERATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": torch.mul,
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "mod": torch.remainder,
    "min": torch.minimum,
    "max": torch.maximum,
}


def sorted_tables(
    rows: Tensor, items: Tensor, places: int, rest: PairCondition | None, numbers: tuple[int, ...]
) -> Tables:
    """Build the tables of `places` blocks, and one more without keys for spare programs.

    `rows`: the row of each query; `items`: the block of each key, from 0 on. Both stay on the device.
    """
    device, count = items.device, places + 1
    sorted_items, order = torch.sort(items, stable=True)
    starts = torch.searchsorted(sorted_items, torch.arange(count + 1, device=device), out_int32=True)
    sizes = starts[1:] - starts[:-1]
    sides = 2 * torch.arange(count, dtype=torch.int32, device=device) + (0 if rest is None else 1)
    sides = torch.where(sizes == 0, 2 * count, sides).int()
    side_of = torch.cat([sides, torch.full((1,), 2 * count, dtype=torch.int32, device=device)])
    return Tables(
        starts=torch.cat([starts, starts[-1:]]),
        side_of=side_of,
        offsets=torch.zeros(len(rows), dtype=torch.int32, device=device),
        order=order,
        positions=order.int(),
        row_of=rows.int(),
        rest=rest,
        numbers=numbers,
        sides=count,
        largest=len(items),
        places=count,
        tiles=lambda size: _key_tiles(starts, len(items), size),
    )


def _key_tiles(starts: Tensor, keys: int, size: int) -> Tensor:
    """Return (block, first key) of the maximum number of key tiles; spare tiles have the last, empty block."""
    count = len(starts) - 1
    tiles = (starts[1:] - starts[:-1] + (size - 1)) // size
    ends = torch.cumsum(tiles, 0, dtype=torch.int32)
    number = torch.arange(keys // size + count, dtype=torch.int32, device=starts.device)
    place = torch.searchsorted(ends, number, right=True, out_int32=True).clamp(max=count - 1)
    first = number - ends.index_select(0, place) + tiles.index_select(0, place)
    return torch.stack([place, starts.index_select(0, place) + first * size], 1).int()


# --- calls -----------------------------------------------------------------------------------------------------------


def attend(planner: Planner, choice: SelectedKeys, call: CallArguments) -> Pair:
    """Compute (out, lse), differentiable once. Raises NotInKernelsError if the device cannot compute block numbers."""
    pattern, sizes, (q, k, v) = planner.pattern, call.sizes, (call.q, call.k, call.v)
    names = {tensor.name for tensor in pattern.tensors}
    shape = call_shape(pattern, sizes, {name: blank(x) for name, x in call.inputs.items() if name in names})
    window = whole(shape.n_q, shape.n_k, pattern.align)
    named, one_head = SizesByName(shape.sizes), {"batch": 0, "head": 0, "group": 1}
    rest, numbers = rest_text(specialise(choice.rest, named, Slices({}), window, **one_head))
    inputs = {name: as_tensor(x) for name, x in call.inputs.items()}
    head_groups = []
    for head_group in head_groups_of(choice, q, k):
        reading = Numbering(inputs, sizes, shape.sizes, head_group.batch, head_group.head, window.shift, q.device)
        items = reading.of(choice.item_of, "k")
        rows = torch.arange(shape.n_q, device=q.device)
        rows = rows if choice.is_by_query else reading.of(choice.row_of, "q")
        if choice.chosen is None:
            blocks = max(reading.bound(choice.row_of), reading.bound(choice.item_of))
            selected, max_blocks = torch.eye(blocks, dtype=torch.bool, device=q.device), 1
        else:
            selected = head_group.of(inputs[choice.chosen.name], choice.chosen.dims[:-2]).to(q.device)
            blocks = max_blocks = selected.shape[-1]
        tables = sorted_tables(rows.expand(shape.n_q), items.expand(shape.n_k), blocks, rest, numbers)
        work = SelectedOnGpu(tables, call.scale, by_batch=False, by_heads=False, most=max_blocks, name=pattern.name)
        head_groups.append(
            OwnBlocks(head_group.batch, head_group.heads, head_group.kv_heads, functional.pad(selected, (0, 1)), work)
        )
    return differentiable(q, k, v, SelectedByData(head_groups), [])
