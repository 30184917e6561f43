"""Attention whose weights or values need more than one score at a time: whole rows, in blocks, in torch.

Nothing of a block is kept: the backward computes it again. The same inputs give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.planning.build_plan import Relations
from attnc.compiler.values import is_own, passes, rank, reads, tensors_of, values_of
from attnc.runtime import widths
from attnc.runtime.attending import attend as attend_block
from attnc.runtime.attending import widened
from attnc.runtime.blocks import Block
from attnc.runtime.cpu.autograd import FirstOrder, once
from attnc.runtime.cpu.kernel import lse_dtype
from attnc.runtime.cpu.planned_call import Call, operands_of
from attnc.runtime.cpu.row_blocks import RowBlock, row_blocks
from attnc.runtime.fallbacks import DENSE, PASSES, note
from attnc.runtime.profiling import backward_row, keep_name
from attnc.runtime.values import Values


@dataclass(frozen=True)
class Leaves:
    """What a block is computed from: vectors of its rows and keys, whole tensors of its batch entry, real inputs."""

    own: dict[str, Tensor]
    whole: dict[str, Tensor]
    inputs: Sequence[Tensor]


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) in the dtype that values are computed in; lse is NaN where the weights are no softmax.

    A row that sees nothing: 0 and -inf.
    """
    node, dtype = call.relations.pattern.attend, lse_dtype(q.dtype)
    _note(call, node)
    out: Tensor | None = None
    lse = q.new_full(q.shape[:3], -math.inf, dtype=dtype)
    tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    for block in _blocks(call, node, inputs):
        leaves = _leaves(block, tensors, node, inputs)
        found, own = computed(block, leaves, call.relations, call.scale)
        if out is None:
            out = q.new_zeros((*q.shape[:3], *found.shape[2:]), dtype=dtype)
        heads, rows = torch.tensor(block.heads)[:, None], torch.from_numpy(block.rows)
        out[block.batch, heads, rows] = found
        lse[block.batch, heads, rows] = math.nan if own is None else own.expand(len(block.heads), len(block.rows))
    if out is None:
        shapes = {tensor.name: x.shape for tensor, x in zip(tensors_of(call.relations.pattern), inputs, strict=True)}
        out = q.new_zeros((*q.shape[:3], *widths.of_out(call.relations, shapes)), dtype=dtype)
    return out, lse


def _note(call: Call, node: ir.Attend) -> None:
    name = call.relations.pattern.name
    if call.plan.fallback is not None and call.plan.executor == "cpu":
        note(name, DENSE, call.plan.fallback)
    if (count := passes(node)) > 1:
        note(name, PASSES, f"the weights of `{node.name}` need {count} passes over the keys of a row")


def _blocks(call: Call, node: ir.Attend, inputs: Sequence[Tensor]) -> Iterator[RowBlock]:
    tables = _tables(node) if all(x.device.type == "cpu" for x in inputs) else {}
    shapes = {tensor.name: x.shape for tensor, x in zip(tensors_of(call.relations.pattern), inputs, strict=True)}
    most = max((_choices(table, shapes[table.tensor.name]) for table in tables.values()), default=0)
    head_dim = max(call.plan.n_q and call.relations.shape.dk, 1)
    width = head_dim if _pair_rank(node, tables) else 1

    def entries(keys: int) -> int:
        return max(keys * width, min(most, keys * head_dim))

    return row_blocks(call.plan, call.relations, entries)


def _tables(node: ir.Attend) -> dict[ir.Value, ir.Element]:
    """Inner products with a vector that the key chooses from a real input, computed for all that a row may meet."""
    found: dict[ir.Value, ir.Element] = {}
    for below in (b for root in values_of(node) for b in root.below):
        if isinstance(below, ir.Dot):
            for table, vector in ((below.left, below.right), (below.right, below.left)):
                if isinstance(table, ir.Element) and "k" in reads(table) - reads(vector) and "q" in reads(vector):
                    found[below] = table
    return found


def _choices(table: ir.Element, shape: Sequence[int]) -> int:
    """How many vectors a key may choose from."""
    return prod(size for size, index in zip(shape, table.indices, strict=False) if "k" in reads(index))


def _pair_rank(node: ir.Attend, tables: Mapping[ir.Value, ir.Element]) -> int:
    """Axes of the widest value that depends on query and key both."""
    below = (b for root in values_of(node) for b in _written(root, tables))
    return max((rank(b) for b in below if not isinstance(b, ir.Outer) and {"q", "k"} <= reads(b)), default=0)


def _written(root: ir.Value, tables: Mapping[ir.Value, ir.Element]) -> Iterator[ir.Value]:
    """The values that a value is made of, each once, without the vectors of tables."""
    found: set[ir.Value] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            yield node
            stack.extend(c for c in node.children() if isinstance(c, ir.VALUES) and c is not tables.get(node))


def _leaves(block: RowBlock, tensors: dict[str, Tensor], node: ir.Attend, inputs: Sequence[Tensor]) -> Leaves:
    """Vectors at their places by block, others whole."""
    group = max(tensors["q"].shape[1] // max(tensors["k"].shape[1], 1), 1)
    heads, rows, keys = torch.tensor(block.heads), torch.from_numpy(block.rows), torch.from_numpy(block.keys)
    whole = {name: tensor[block.batch] for name, tensor in tensors.items()}
    own = {"q": whole["q"][heads[:, None], rows][:, :, None]}
    for name in ("k", "v") if node.keys is None else ():
        own[name] = whole[name][heads[:, None] // group, keys][:, None]
    return Leaves(own, whole, inputs)


def computed(block: RowBlock, leaves: Leaves, relations: Relations, scale: float) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a block, for each of its heads and rows."""
    node = relations.pattern.attend
    q, k, v = ([leaves.whole[name]] * (block.batch + 1) for name in ("q", "k", "v"))
    operands = operands_of(relations, scale, (q, k, v), leaves.inputs)
    window, seen = block.window, block.mask[None]
    first_key = 0 if operands.spaced else window.key
    place = Block(block.batch, block.heads, window, block.rows - window.row, block.keys - first_key, seen, seen=seen)
    out, lse = attend_block(Values(operands, place, leaves.own), node)
    return widened(out, len(block.heads), len(block.rows), node), lse


# --- backward --------------------------------------------------------------------------------------------------------


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tensors: tuple[Tensor, Tensor, Tensor],
    call: Call,
    inputs: Sequence[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The gradients of `forward`: of q, k, v, and of those inputs that require them."""
    node, dtype = call.relations.pattern.attend, lse_dtype(tensors[0].dtype)
    named = dict(zip(("q", "k", "v"), (x.to(dtype) for x in tensors), strict=True))
    sums = {name: torch.zeros_like(x, dtype=dtype) for name, x in named.items()}
    of_inputs = [torch.zeros_like(x, dtype=dtype) for x in inputs if x.requires_grad]
    elsewhere = _elsewhere(node)
    for block in _blocks(call, node, inputs):
        leaves = _leaves(block, named, node, inputs)
        heads, rows = torch.tensor(block.heads)[:, None], torch.from_numpy(block.rows)
        with torch.enable_grad():
            own = {name: x.detach().requires_grad_() for name, x in leaves.own.items()}
            whole = {n: x.detach().requires_grad_() if n in elsewhere else x for n, x in leaves.whole.items()}
            out, lse = computed(block, Leaves(own, whole, inputs), call.relations, call.scale)
            lse = None if lse is None else lse.expand(len(block.heads), len(block.rows))
        wanted = [*own.values(), *(whole[n] for n in elsewhere), *(x for x in inputs if x.requires_grad)]
        results, grads = [], []
        for result, grad in ((out, grad_out), (lse, grad_lse)):
            if result is not None and grad is not None and result.requires_grad:
                results.append(result)
                grads.append(grad[block.batch, heads, rows].to(dtype))
        if not results:
            continue
        seen = torch.from_numpy(block.mask.any(axis=1)).to(tensors[0].device)
        grads = [torch.where(seen.reshape(-1, *[1] * (g.ndim - 2)), g, 0) for g in grads]
        found = iter(torch.autograd.grad(results, wanted, grads, allow_unused=True))
        for name in own:
            _add_own(sums[name][block.batch], next(found), block, name, call)
        for name in elsewhere:
            grad = next(found)
            if grad is not None:
                sums[name][block.batch] += grad
        for total, grad in zip(of_inputs, found, strict=True):
            if grad is not None:
                total.add_(grad)
    return sums, of_inputs


def _elsewhere(node: ir.Attend) -> list[str]:
    """The tensors that are read elsewhere than at their places."""
    read = {b for root in values_of(node) for b in root.below if isinstance(b, ir.Vec)}
    spaced = node.keys is not None
    return [n for n in ("q", "k", "v") if any(b.tensor == n and (not is_own(b) or spaced) for b in read)]


def _add_own(total: Tensor, grad: Tensor | None, block: RowBlock, name: str, call: Call) -> None:
    """Add the gradients of the vectors at their places, those by query head in the order of the heads."""
    if grad is None:
        return
    if name == "q":
        total[torch.tensor(block.heads)[:, None], torch.from_numpy(block.rows)] += grad[:, :, 0]
        return
    group, keys = max(call.plan.heads // max(call.plan.kv_heads, 1), 1), torch.from_numpy(block.keys)
    for i, head in enumerate(block.heads):
        total[head // group, keys] += grad[i, 0]


class _Attend(FirstOrder):
    """`forward`, recorded."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, call, inputs)
        ctx.call = call
        keep_name(ctx)
        ctx.save_for_backward(q, k, v, *inputs)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[4:]
        with backward_row(ctx):
            found = once(_gradients, ctx.call, needs, grad_out, grad_lse, *ctx.saved_tensors)
        return (*found[:3], None, *found[3:])


def _gradients(
    call: Call, needs: Sequence[bool], grad_out: Tensor | None, grad_lse: Tensor | None, *kept: Tensor
) -> tuple[Tensor | None, ...]:
    """Those of q, k, v, and of the real inputs that need them."""
    q, k, v, *inputs = (x.detach() for x in kept)
    leaves = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    sums, of_inputs = backward(grad_out, grad_lse, (q, k, v), call, leaves)
    rest = iter(of_inputs)
    given = [next(rest).to(x.dtype) if need else None for x, need in zip(leaves, needs, strict=True)]
    return (*(sums[name].to(q.dtype) for name in ("q", "k", "v")), *given)


def attend(q: Tensor, k: Tensor, v: Tensor, call: Call, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of an attention with weights, values or keys of its own, differentiable once; see `forward`."""
    return cast("tuple[Tensor, Tensor]", _Attend.apply(q, k, v, call, *inputs))  # type: ignore[no-untyped-call]
