"""Attention whose weights or values need all scores of a row at once: whole rows, in blocks, in torch.

No intermediate of a block is saved: the backward recomputes it. Equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import (
    is_own,
    passes,
    rank,
    reads,
    tensors_of,
    values_of,
)
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.executors.cpu.autograd import FirstOrder, once
from attnc.runtime.executors.cpu.flash_kernel import lse_dtype
from attnc.runtime.executors.cpu.hidden_values import beyond, is_finite
from attnc.runtime.executors.cpu.planned_call import PlannedCall, operands_of
from attnc.runtime.executors.cpu.row_blocks import Int64, RowBlock, row_blocks
from attnc.runtime.executors.cpu.spoiled import Spoiled, alike, spoiled
from attnc.runtime.fallbacks import DENSE, PASSES, note
from attnc.runtime.process.profiling import backward_row, keep_name
from attnc.runtime.values import widths
from attnc.runtime.values.attending import attend as attend_block
from attnc.runtime.values.attending import widened
from attnc.runtime.values.block_values import BlockValues
from attnc.runtime.values.pair_blocks import PairBlock


@dataclass(frozen=True)
class BlockOperands:
    """The operands of a block: vectors of its rows and keys, tensors of its batch entry, floating-point inputs."""

    own: dict[str, Tensor]
    whole: dict[str, Tensor]
    inputs: Sequence[Tensor]


def forward(q: Tensor, k: Tensor, v: Tensor, call: PlannedCall, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) in the dtype of values; lse is NaN without a softmax.

    A row that sees no key gives 0 and -inf.
    """
    node, dtype = call.relations.pattern.attend, lse_dtype(q.dtype)
    _note(call, node)
    out: Tensor | None = None
    lse = q.new_full(q.shape[:3], -math.inf, dtype=dtype)
    tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    for whole in _blocks(call, node, inputs):
        leaves = _leaves(whole, tensors, node, inputs)
        for block, block_out, block_lse in results(whole, leaves, call.relations, call.scale):
            if out is None:
                out = q.new_zeros((*q.shape[:3], *block_out.shape[2:]), dtype=dtype)
            heads, rows = torch.tensor(block.heads)[:, None], torch.from_numpy(block.rows)
            out[block.batch, heads, rows] = block_out
            lse[block.batch, heads, rows] = (
                math.nan if block_lse is None else block_lse.expand(len(block.heads), len(block.rows))
            )
    if out is None:
        shapes = {tensor.name: x.shape for tensor, x in zip(tensors_of(call.relations.pattern), inputs, strict=True)}
        out = q.new_zeros((*q.shape[:3], *widths.of_out(call.relations, shapes)), dtype=dtype)
    return out, lse


def results(
    block: RowBlock, leaves: BlockOperands, relations: Relations, scale: float
) -> Iterator[tuple[RowBlock, Tensor, Tensor | None]]:
    """Yield (block, out, lse) of a block, and of its rows that hidden keys may have spoiled, recomputed separately."""
    out, lse = computed(block, leaves, relations, scale)
    if is_finite(out) or block.mask.all():
        yield block, out, lse
        return
    bad = _spoiled(block, leaves)
    isolated = not leaves.inputs and not _elsewhere(relations.pattern.attend)  # only `own` can be spoiled
    skip = isolated and bool(bad.rows.all())
    clean, clean_lse = (out, lse) if skip else computed(block, _filled(leaves, bad), relations, scale)
    finite = clean.flatten(2).isfinite().all(-1)
    row_mask = bad.rows.reshape(*bad.rows.shape, *[1] * (out.ndim - 2))
    lse = None if lse is None or clean_lse is None else torch.where(bad.rows, lse, clean_lse)
    yield block, torch.where(row_mask, out, clean), lse
    harmful = bad.keys.any(0).numpy(force=True)
    if not skip and not finite.all():  # something else is spoiled, such as an input
        harmful = np.ones_like(harmful)
    rows = bad.and_rows(~finite).numbers
    if len(alike(block.mask[:, harmful], rows)) > 1:  # NaN stays NaN, whatever is added
        part, part_operands = _part(block, leaves, rows, ~harmful | block.mask[rows].all(axis=0))
        if len(part.keys):
            part_out, _ = computed(part, part_operands, relations, scale)
            rows = rows[~part_out.flatten(2).isnan().all(-1).all(0).numpy(force=True)]
    for same_rows in alike(block.mask[:, harmful], rows):
        part, part_operands = _part(block, leaves, same_rows, ~harmful | block.mask[same_rows[0]])
        if len(part.keys):
            yield part, *computed(part, part_operands, relations, scale)


def _part(
    block: RowBlock, leaves: BlockOperands, rows: Int64, keys: NDArray[np.bool_]
) -> tuple[RowBlock, BlockOperands]:
    """Return some rows of a block with the `keys` that one of the rows sees, and the operands of that part."""
    seen = np.flatnonzero(keys & block.mask[rows].any(axis=0))
    at_rows, at_keys = (torch.from_numpy(x).to(leaves.own["q"].device) for x in (rows, seen))
    part_vectors = {name: x[:, at_rows] if name == "q" else x[:, :, at_keys] for name, x in leaves.own.items()}
    return block.part(rows, seen), replace(leaves, own=part_vectors)


def _spoiled(block: RowBlock, leaves: BlockOperands, further: Tensor | None = None) -> Spoiled:
    """Find the spoiled vectors of a block; `further`: rows that are spoiled for another reason."""
    q = leaves.own["q"][:, :, 0]
    nothing = q.new_zeros((len(block.heads), len(block.keys), 1))
    k, v = (leaves.own[name][:, 0] if name in leaves.own else nothing for name in ("k", "v"))
    return spoiled(block.mask, q, k, v, further)


def _filled(leaves: BlockOperands, bad: Spoiled) -> BlockOperands:
    vectors = {"q": bad.filled_queries(leaves.own["q"][:, :, 0])[:, :, None]}
    vectors |= {name: bad.filled_keys(x[:, 0])[:, None] for name, x in leaves.own.items() if name != "q"}
    return replace(leaves, own=vectors)


def _note(call: PlannedCall, node: ir.Attend) -> None:
    name = call.relations.pattern.name
    if call.plan.fallback is not None and call.plan.executor == "cpu":
        note(name, DENSE, call.plan.fallback)
    if (count := passes(node)) > 1:
        note(name, PASSES, f"the weights of `{node.name}` need {count} passes over the keys of a row")


def _blocks(call: PlannedCall, node: ir.Attend, inputs: Sequence[Tensor]) -> Iterator[RowBlock]:
    tables = _tables(node) if all(x.device.type == "cpu" for x in inputs) else {}
    shapes = {tensor.name: x.shape for tensor, x in zip(tensors_of(call.relations.pattern), inputs, strict=True)}
    max_choices = max((_choices(table, shapes[table.tensor.name]) for table in tables.values()), default=0)
    head_dim = max(call.plan.n_q and call.relations.shape.dk, 1)
    width = head_dim if _pair_rank(node, tables) else 1

    def entries(keys: int) -> int:
        return max(keys * width, min(max_choices, keys * head_dim))

    return row_blocks(call.plan, call.relations, entries)


def _tables(node: ir.Attend) -> dict[ir.Value, ir.Element]:
    """Return inner products with a vector that the key selects from an input, each with the input's table.

    The products are computed for every vector that a row may meet.
    """
    table_of: dict[ir.Value, ir.Element] = {}
    for subexpression in (b for root in values_of(node) for b in root.below):
        if isinstance(subexpression, ir.Dot):
            for table, vector in ((subexpression.left, subexpression.right), (subexpression.right, subexpression.left)):
                if isinstance(table, ir.Element) and "k" in reads(table) - reads(vector) and "q" in reads(vector):
                    table_of[subexpression] = table
    return table_of


def _choices(table: ir.Element, shape: Sequence[int]) -> int:
    """Return how many vectors a key may select from."""
    return prod(size for size, index in zip(shape, table.indices, strict=False) if "k" in reads(index))


def _pair_rank(node: ir.Attend, tables: Mapping[ir.Value, ir.Element]) -> int:
    """Return the number of axes of the widest value that depends on both query and key."""
    subexpressions = (b for root in values_of(node) for b in _written(root, tables))
    return max((rank(b) for b in subexpressions if not isinstance(b, ir.Outer) and {"q", "k"} <= reads(b)), default=0)


def _written(root: ir.Value, tables: Mapping[ir.Value, ir.Element]) -> Iterator[ir.Value]:
    """Yield the subexpressions of a value, each once, without the vectors of tables."""
    visited: set[ir.Value] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in visited:
            visited.add(node)
            yield node
            stack.extend(c for c in node.children() if isinstance(c, ir.VALUES) and c is not tables.get(node))


def _leaves(block: RowBlock, tensors: dict[str, Tensor], node: ir.Attend, inputs: Sequence[Tensor]) -> BlockOperands:
    """Gather vectors at their own positions by block; other tensors stay whole."""
    group = max(tensors["q"].shape[1] // max(tensors["k"].shape[1], 1), 1)
    heads, rows, keys = torch.tensor(block.heads), torch.from_numpy(block.rows), torch.from_numpy(block.keys)
    whole = {name: tensor[block.batch] for name, tensor in tensors.items()}
    block_vectors = {"q": whole["q"][heads[:, None], rows][:, :, None]}
    for name in ("k", "v") if node.keys is None else ():
        block_vectors[name] = whole[name][heads[:, None] // group, keys][:, None]
    return BlockOperands(block_vectors, whole, inputs)


def computed(
    block: RowBlock, leaves: BlockOperands, relations: Relations, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Compute (out, lse) of a block, for each of its heads and rows."""
    node = relations.pattern.attend
    q, k, v = ([leaves.whole[name]] * (block.batch + 1) for name in ("q", "k", "v"))
    operands = operands_of(relations, scale, (q, k, v), leaves.inputs)
    window, seen = block.window, block.mask[None]
    first_key = 0 if operands.spaced else window.key
    place = PairBlock(
        block.batch, block.heads, window, block.rows - window.row, block.keys - first_key, seen, visible=seen
    )
    out, lse = attend_block(BlockValues(operands, place, leaves.own), node)
    return widened(out, len(block.heads), len(block.rows), node), lse


# --- backward --------------------------------------------------------------------------------------------------------


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tensors: tuple[Tensor, Tensor, Tensor],
    call: PlannedCall,
    inputs: Sequence[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Compute the gradients of `forward`: of q, k, v, and of the inputs that require them."""
    node, dtype = call.relations.pattern.attend, lse_dtype(tensors[0].dtype)
    named = dict(zip(("q", "k", "v"), (x.to(dtype) for x in tensors), strict=True))
    sums = {name: torch.zeros_like(x, dtype=dtype) for name, x in named.items()}
    of_inputs = [torch.zeros_like(x, dtype=dtype) for x in inputs if x.requires_grad]
    total = GradientTotals(sums, of_inputs, inputs)
    for block in _blocks(call, node, inputs):
        _add_block(block, named, (grad_out, grad_lse), call, total)
    return sums, of_inputs


@dataclass(frozen=True)
class GradientTotals:
    """Accumulated gradients of q, k and v by name, and of the `inputs` that require them."""

    vectors: dict[str, Tensor]
    of_inputs: list[Tensor]
    inputs: Sequence[Tensor]


GivenGradients = tuple["Tensor | None", "Tensor | None"]
"""Gradients of out and LSE of a block, (heads, rows[, …])."""


def _add_block(
    block: RowBlock, named: dict[str, Tensor], grads: GivenGradients, call: PlannedCall, sums: GradientTotals
) -> None:
    """Add the gradients of a block; a spoiled row contributes only where it sees a key."""
    node = call.relations.pattern.attend
    heads, rows = torch.tensor(block.heads)[:, None], torch.from_numpy(block.rows)
    grad_out, grad_lse = (None if grad is None else grad[block.batch, heads, rows] for grad in grads)
    leaves = _leaves(block, named, node, sums.inputs)
    gradients = _block_gradients(block, leaves, (grad_out, grad_lse), call)
    if block.mask.all() or _are_finite(gradients):
        _add_found(block, gradients, call, sums)
        return
    bad = _spoiled(block, leaves, _beyond_rows(grad_out, grad_lse))
    own_alone = _no_numbers(block, bad.rows, gradients, call)
    if not bad.rows.all():
        clean = _block_gradients(block, _filled(leaves, bad), _without(bad.rows, grad_out, grad_lse), call)
        if _are_finite(clean):
            _add_found(block, clean, call, sums)
        else:  # something else is spoiled, such as an input
            bad = bad.and_rows(torch.ones_like(bad.rows))
    _add_spoiled(block, leaves, (grad_out, grad_lse), call, sums, bad, gradients, own_alone)


def _add_spoiled(
    block: RowBlock,
    leaves: BlockOperands,
    grads: GivenGradients,
    call: PlannedCall,
    sums: GradientTotals,
    bad: Spoiled,
    gradients: Sequence[Tensor | None],
    own_alone: NDArray[np.bool_],
) -> None:
    """Add the gradients of the spoiled rows of a block, grouped by rows that see the same keys.

    Rows of `own_alone` whose keys already have only NaN sums only add the query part of `gradients`.
    """
    settled: NDArray[np.bool_] | None = None
    query_only = []
    for same_rows in alike(block.mask, bad.numbers):
        if own_alone[same_rows].all():
            settled = _settled(block, gradients, call, sums) if settled is None else settled
        if own_alone[same_rows].all() and settled is not None and settled[block.mask[same_rows[0]]].all():
            query_only.append(same_rows)
            continue
        part, part_operands = _part(block, leaves, same_rows, block.mask[same_rows[0]])
        if len(part.keys):
            positions = torch.from_numpy(same_rows)
            part_grads = (None if grad is None else grad[:, positions] for grad in grads)
            incoming = _without(~bad.rows[:, positions], *part_grads)
            _add_found(part, _block_gradients(part, part_operands, incoming, call), call, sums)
            settled = None
    if query_only and gradients[0] is not None:
        rows_left = np.concatenate(query_only)
        part = block.part(rows_left, np.arange(len(block.keys)))
        _add_own(sums.vectors["q"][block.batch], gradients[0][:, torch.from_numpy(rows_left)], part, "q", call)


def _are_finite(gradients: Sequence[Tensor | None]) -> bool:
    return all(x is None or is_finite(x) for x in gradients)


def _no_numbers(
    block: RowBlock, bad: Tensor, gradients: Sequence[Tensor | None], call: PlannedCall
) -> NDArray[np.bool_]:
    """Return the rows that are spoiled in all heads and whose query gradient is NaN even without hidden keys."""
    node = call.relations.pattern.attend
    if node.keys is not None or _elsewhere(node) or not gradients or gradients[0] is None:
        return np.zeros(len(block.rows), dtype=np.bool_)
    return (bad & gradients[0].flatten(2).isnan().all(-1)).all(0).numpy(force=True)


def _settled(
    block: RowBlock, gradients: Sequence[Tensor | None], call: PlannedCall, sums: GradientTotals
) -> NDArray[np.bool_]:
    """Return the keys whose sums spoiled rows cannot change: they, and the sums of inputs, hold no finite number."""
    group = max(call.plan.heads // max(call.plan.kv_heads, 1), 1)
    heads, keys = torch.tensor(block.heads)[:, None] // group, torch.from_numpy(block.keys)
    if any(bool(x.isfinite().any()) for x in sums.of_inputs):
        return np.zeros(len(keys), dtype=np.bool_)
    read = [name for name, x in zip(("q", "k", "v"), gradients, strict=False) if name != "q" and x is not None]
    numbers = [sums.vectors[name][block.batch][heads, keys].isfinite().any(-1).any(0) for name in read]
    return ~torch.stack(numbers).any(0).numpy(force=True) if numbers else np.zeros(len(keys), dtype=np.bool_)


def _beyond_rows(grad_out: Tensor | None, grad_lse: Tensor | None) -> Tensor | None:
    """Return the rows (heads, rows) whose gradients are not finite."""
    masks = [
        beyond(grad.flatten(2) if grad.ndim > 2 else grad[..., None])
        for grad in (grad_out, grad_lse)
        if grad is not None
    ]
    return masks[0] | masks[-1] if masks else None


def _without(rows: Tensor, grad_out: Tensor | None, grad_lse: Tensor | None) -> GivenGradients:
    """Return gradients with zeros in `rows`."""
    grad_out, grad_lse = (
        None if grad is None else torch.where(rows.reshape(*rows.shape, *[1] * (grad.ndim - 2)), 0, grad)
        for grad in (grad_out, grad_lse)
    )
    return grad_out, grad_lse


def _add_found(block: RowBlock, gradients: Sequence[Tensor | None], call: PlannedCall, sums: GradientTotals) -> None:
    """Add the gradients that `_block_gradients` returned."""
    if not gradients:
        return
    node, remaining = call.relations.pattern.attend, iter(gradients)
    for name in ("q", "k", "v") if node.keys is None else ("q",):
        _add_own(sums.vectors[name][block.batch], next(remaining), block, name, call)
    for name in _elsewhere(node):
        grad = next(remaining)
        if grad is not None:
            sums.vectors[name][block.batch] += grad
    for total, grad in zip(sums.of_inputs, remaining, strict=True):
        if grad is not None:
            total.add_(grad)


def _block_gradients(
    block: RowBlock, leaves: BlockOperands, incoming: GivenGradients, call: PlannedCall
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of own-position vectors, of tensors read elsewhere, and of inputs; () if there are none."""
    elsewhere = _elsewhere(call.relations.pattern.attend)
    with torch.enable_grad():
        leaf_vectors = {name: x.detach().requires_grad_() for name, x in leaves.own.items()}
        whole = {n: x.detach().requires_grad_() if n in elsewhere else x for n, x in leaves.whole.items()}
        out, lse = computed(block, BlockOperands(leaf_vectors, whole, leaves.inputs), call.relations, call.scale)
        lse = None if lse is None else lse.expand(len(block.heads), len(block.rows))
    wanted = [*leaf_vectors.values(), *(whole[n] for n in elsewhere), *(x for x in leaves.inputs if x.requires_grad)]
    results, grads = [], []
    for result, grad in zip((out, lse), incoming, strict=True):
        if result is not None and grad is not None and result.requires_grad:
            results.append(result)
            grads.append(grad.to(result.dtype))
    if not results:
        return ()
    seen = torch.from_numpy(block.mask.any(axis=1)).to(out.device)
    grads = [torch.where(seen.reshape(-1, *[1] * (g.ndim - 2)), g, 0) for g in grads]
    return torch.autograd.grad(results, wanted, grads, allow_unused=True)


def _elsewhere(node: ir.Attend) -> list[str]:
    """Return the tensors that are read at positions other than the row's or key's own."""
    read = {b for root in values_of(node) for b in root.below if isinstance(b, ir.Vec)}
    spaced = node.keys is not None
    return [n for n in ("q", "k", "v") if any(b.tensor == n and (not is_own(b) or spaced) for b in read)]


def _add_own(total: Tensor, grad: Tensor | None, block: RowBlock, name: str, call: PlannedCall) -> None:
    """Add the gradients of vectors at their own positions; query heads are added in the order of the heads."""
    if grad is None:
        return
    if name == "q":
        total[torch.tensor(block.heads)[:, None], torch.from_numpy(block.rows)] += grad[:, :, 0]
        return
    group, keys = max(call.plan.heads // max(call.plan.kv_heads, 1), 1), torch.from_numpy(block.keys)
    for i, head in enumerate(block.heads):
        total[head // group, keys] += grad[i, 0]


class _RowFunction(FirstOrder):
    """The autograd function of `forward`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: PlannedCall, *inputs: Tensor) -> tuple[Tensor, Tensor]:
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
            gradients = once(_gradients, ctx.call, needs, grad_out, grad_lse, *ctx.saved_tensors)
        return (*gradients[:3], None, *gradients[3:])


def _gradients(
    call: PlannedCall, needs: Sequence[bool], grad_out: Tensor | None, grad_lse: Tensor | None, *kept: Tensor
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of q, k, v, and of the floating-point inputs that need them."""
    q, k, v, *inputs = (x.detach() for x in kept)
    leaves = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    sums, of_inputs = backward(grad_out, grad_lse, (q, k, v), call, leaves)
    rest = iter(of_inputs)
    input_grads = [next(rest).to(x.dtype) if need else None for x, need in zip(leaves, needs, strict=True)]
    return (*(sums[name].to(q.dtype) for name in ("q", "k", "v")), *input_grads)


def attend(q: Tensor, k: Tensor, v: Tensor, call: PlannedCall, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) of an attention with custom weights, values or keys, differentiable once; see `forward`."""
    return cast("tuple[Tensor, Tensor]", _RowFunction.apply(q, k, v, call, *inputs))  # type: ignore[no-untyped-call]
