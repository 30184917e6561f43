"""Attention by blocks of whole rows: each block is computed at once, and vectors that it hides reach no row.

No intermediate of a block is saved: the backward recomputes it. Equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import passes, rank, reads, tensors_of, values_of
from attnc.runtime.executors.cpu.autograd import FirstOrder, once
from attnc.runtime.executors.cpu.block_work import (
    BlockOperands,
    BlockResults,
    BlockWork,
    Gradients,
    InTorch,
    RowData,
    append_axes,
    read_elsewhere,
)
from attnc.runtime.executors.cpu.flash_kernel import lse_dtype
from attnc.runtime.executors.cpu.hidden_values import beyond, is_finite
from attnc.runtime.executors.cpu.planned_call import PlannedCall
from attnc.runtime.executors.cpu.row_blocks import Int64, RowBlock, row_blocks
from attnc.runtime.executors.cpu.spoiled import Spoiled, alike, spoiled
from attnc.runtime.fallbacks import DENSE, PASSES, note
from attnc.runtime.process.profiling import backward_row, keep_name
from attnc.runtime.values import widths

MakeWork: TypeAlias = Callable[[PlannedCall, Tensor, Tensor, Sequence[Tensor]], BlockWork]
"""A function (call, q, k, inputs) → the work of the call's blocks."""


def in_torch(call: PlannedCall, q: Tensor, k: Tensor, inputs: Sequence[Tensor]) -> InTorch:
    """Return the work of any attention."""
    del k, inputs
    return InTorch(call.relations, call.scale, lse_dtype(q.dtype))


def forward(q: Tensor, k: Tensor, v: Tensor, call: PlannedCall, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) in the dtype of values; lse is NaN without a softmax.

    A row that sees no key gives 0 and -inf.
    """
    out, lse, _ = _rows((q, k, v), call, inputs, in_torch(call, q, k, inputs))
    return out, lse


def _rows(
    tensors: tuple[Tensor, Tensor, Tensor], call: PlannedCall, inputs: Sequence[Tensor], work: BlockWork
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute (out, lse, shift) of every row; shift is None if no row has one."""
    q, dtype = tensors[0], lse_dtype(tensors[0].dtype)
    _note(call, work.node)
    out: Tensor | None = None
    shift: Tensor | None = None
    lse = q.new_full(q.shape[:3], -math.inf, dtype=dtype)
    named = {name: work.vectors(x) for name, x in zip("qkv", tensors, strict=True)}
    for whole in _blocks(call, work, inputs):
        for block, results in isolated(whole, _leaves(whole, named, work.node, inputs), work):
            if out is None:
                out = q.new_zeros((*q.shape[:3], *results.out.shape[2:]), dtype=dtype)
            out[block.at] = results.out.to(dtype)
            lse[block.at] = math.nan if results.lse is None else results.lse
            if results.shift is not None:
                shift = torch.zeros_like(lse) if shift is None else shift
                shift[block.at] = results.shift
    if out is None:
        shapes = {tensor.name: x.shape for tensor, x in zip(tensors_of(call.relations.pattern), inputs, strict=True)}
        out = q.new_zeros((*q.shape[:3], *widths.of_out(call.relations, shapes)), dtype=dtype)
    return out, lse, shift


def isolated(block: RowBlock, leaves: BlockOperands, work: BlockWork) -> Iterator[tuple[RowBlock, BlockResults]]:
    """Yield the results of a block, and of its rows that hidden keys may have spoiled, recomputed separately."""
    results = work.computed(block, leaves)
    if is_finite(results.out) or block.mask.all():
        yield block, results
        return
    bad = _spoiled(block, leaves)
    only_own = not leaves.inputs and not read_elsewhere(work.node)  # only `own` can be spoiled
    skip = only_own and bool(bad.rows.all())
    clean = results if skip else work.computed(block, _filled(leaves, bad))
    finite = clean.out.flatten(2).isfinite().all(-1)
    yield block, _chosen(bad.rows, results, clean)
    harmful = bad.keys.any(0).numpy(force=True)
    if not skip and not finite.all():  # something else is spoiled, such as an input
        harmful = np.ones_like(harmful)
    rows = bad.and_rows(~finite).numbers
    if len(alike(block.mask[:, harmful], rows)) > 1:  # NaN stays NaN, whatever is added
        part, part_operands = _part(block, leaves, rows, ~harmful | block.mask[rows].all(axis=0))
        if len(part.keys):
            part_out = work.recomputed(part, part_operands).out
            rows = rows[~part_out.flatten(2).isnan().all(-1).all(0).numpy(force=True)]
    for same_rows in alike(block.mask[:, harmful], rows):
        part, part_operands = _part(block, leaves, same_rows, ~harmful | block.mask[same_rows[0]])
        if len(part.keys):
            yield part, work.recomputed(part, part_operands)


def _chosen(rows: Tensor, results: BlockResults, clean: BlockResults) -> BlockResults:
    """Return `results` in some rows (heads, rows), and `clean` results in the others."""
    if results is clean:
        return results
    lse, shift = (
        None if a is None and b is None else torch.where(rows, 0 if a is None else a, 0 if b is None else b)
        for a, b in zip(results[1:], clean[1:], strict=True)
    )
    return BlockResults(torch.where(append_axes(rows, results.out.ndim), results.out, clean.out), lse, shift)


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


def _blocks(call: PlannedCall, work: BlockWork, inputs: Sequence[Tensor]) -> Iterator[RowBlock]:
    node = work.node
    tables = _tables(node) if all(x.device.type == "cpu" for x in inputs) else {}
    shapes = {tensor.name: x.shape for tensor, x in zip(tensors_of(call.relations.pattern), inputs, strict=True)}
    max_choices = max((_choices(table, shapes[table.tensor.name]) for table in tables.values()), default=0)
    head_dim = max(call.plan.n_q and call.relations.shape.dk, 1)
    width = head_dim if _pair_rank(node, tables) else 1

    def entries(keys: int) -> int:
        return max(keys * width, min(max_choices, keys * head_dim))

    return row_blocks(call.plan, call.relations, entries, work.least_rows)


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


def _leaves(block: RowBlock, tensors: Mapping[str, Tensor], node: ir.Attend, inputs: Sequence[Tensor]) -> BlockOperands:
    """Gather vectors at their own positions by block; other tensors stay whole."""
    group = max(tensors["q"].shape[1] // max(tensors["k"].shape[1], 1), 1)
    _, heads, rows = block.at
    keys = torch.from_numpy(block.keys)
    whole = {name: tensor[block.batch] for name, tensor in tensors.items()}
    block_vectors = {"q": whole["q"][heads, rows][:, :, None]}
    for name in ("k", "v") if node.keys is None else ():
        block_vectors[name] = whole[name][heads // group, keys][:, None]
    return BlockOperands(block_vectors, whole, inputs)


# --- backward --------------------------------------------------------------------------------------------------------


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tensors: tuple[Tensor, Tensor, Tensor],
    call: PlannedCall,
    inputs: Sequence[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Compute the gradients of `forward`: of q, k, v, and of the inputs that require them."""
    work = in_torch(call, tensors[0], tensors[1], inputs)
    return _row_gradients(RowData(grad_out, grad_lse), tensors, call, inputs, work)


def _row_gradients(
    rows: RowData,
    tensors: tuple[Tensor, Tensor, Tensor],
    call: PlannedCall,
    inputs: Sequence[Tensor],
    work: BlockWork,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    named = {name: work.vectors(x) for name, x in zip("qkv", tensors, strict=True)}
    rows, dtype = work.prepared(rows), lse_dtype(tensors[0].dtype)
    sums = {name: torch.zeros_like(x, dtype=dtype) for name, x in named.items()}
    totals = GradientTotals(work, sums, [torch.zeros_like(x, dtype=dtype) for x in inputs if x.requires_grad])
    for block in _blocks(call, work, inputs):
        _add_block(block, _leaves(block, named, work.node, inputs), rows.at(*block.at), totals)
    return totals.vectors, totals.of_inputs


@dataclass(frozen=True)
class GradientTotals:
    """Accumulated gradients of q, k and v by name, and of the inputs that require them."""

    work: BlockWork
    vectors: dict[str, Tensor]
    of_inputs: list[Tensor]

    def add(self, block: RowBlock, gradients: Gradients) -> None:
        """Add the gradients of a block."""
        if not gradients:
            return
        node, remaining = self.work.node, iter(gradients)
        for name in ("q", "k", "v") if node.keys is None else ("q",):
            self.add_own(block, name, next(remaining))
        for name in read_elsewhere(node):
            grad = next(remaining)
            if grad is not None:
                self.vectors[name][block.batch] += grad
        for total, grad in zip(self.of_inputs, remaining, strict=True):
            if grad is not None:
                total.add_(grad)

    def add_own(self, block: RowBlock, name: str, grad: Tensor | None) -> None:
        """Add the gradients of vectors at their own positions; query heads are added in the order of the heads."""
        if grad is None:
            return
        if name == "q":
            self.vectors["q"][block.at] += grad[:, :, 0]
            return
        total, keys = self.vectors[name][block.batch], torch.from_numpy(block.keys)
        for i, head in enumerate(block.heads):
            total[head // self.group, keys] += grad[i, 0]

    @property
    def group(self) -> int:
        """The number of query heads per kv head."""
        return max(self.vectors["q"].shape[1] // max(self.vectors["k"].shape[1], 1), 1)

    def settled(self, block: RowBlock, gradients: Gradients) -> NDArray[np.bool_]:
        """Return the keys whose sums spoiled rows cannot change: they and the sums of inputs hold no finite number."""
        _, heads, _ = block.at
        keys = torch.from_numpy(block.keys)
        if any(bool(x.isfinite().any()) for x in self.of_inputs):
            return np.zeros(len(keys), dtype=np.bool_)
        read = [name for name, x in zip(("q", "k", "v"), gradients, strict=False) if name != "q" and x is not None]
        numbers = [self.vectors[n][block.batch][heads // self.group, keys].isfinite().any(-1).any(0) for n in read]
        return ~torch.stack(numbers).any(0).numpy(force=True) if numbers else np.zeros(len(keys), dtype=np.bool_)


def _add_block(block: RowBlock, leaves: BlockOperands, rows: RowData, totals: GradientTotals) -> None:
    """Add the gradients of a block; a spoiled row contributes only where it sees a key."""
    work = totals.work
    gradients = work.gradients(block, leaves, rows)
    if block.mask.all() or _are_finite(gradients):
        totals.add(block, gradients)
        return
    bad = _spoiled(block, leaves, _beyond_rows(rows))
    own_alone = _no_numbers(block, bad.rows, gradients, work.node)
    if not bad.rows.all():
        clean = work.gradients(block, _filled(leaves, bad), rows.without(bad.rows))
        if _are_finite(clean):
            totals.add(block, clean)
        else:  # something else is spoiled, such as an input
            bad = bad.and_rows(torch.ones_like(bad.rows))
    _add_spoiled(block, leaves, rows, totals, bad, gradients, own_alone)


def _add_spoiled(
    block: RowBlock,
    leaves: BlockOperands,
    rows: RowData,
    totals: GradientTotals,
    bad: Spoiled,
    gradients: Gradients,
    own_alone: NDArray[np.bool_],
) -> None:
    """Add the gradients of the spoiled rows of a block, grouped by rows that see the same keys.

    Rows of `own_alone` whose keys already have only NaN sums only add the query part of `gradients`.
    """
    settled: NDArray[np.bool_] | None = None
    query_only = []
    for same_rows in alike(block.mask, bad.numbers):
        if own_alone[same_rows].all():
            settled = totals.settled(block, gradients) if settled is None else settled
        if own_alone[same_rows].all() and settled is not None and settled[block.mask[same_rows[0]]].all():
            query_only.append(same_rows)
            continue
        part, part_operands = _part(block, leaves, same_rows, block.mask[same_rows[0]])
        if len(part.keys):
            positions = torch.from_numpy(same_rows)
            part_rows = rows.at(slice(None), positions).without(~bad.rows[:, positions])
            totals.add(part, totals.work.gradients(part, part_operands, part_rows))
            settled = None
    if query_only and gradients[0] is not None:
        rows_left = np.concatenate(query_only)
        part = block.part(rows_left, np.arange(len(block.keys)))
        totals.add_own(part, "q", gradients[0][:, torch.from_numpy(rows_left)])


def _are_finite(gradients: Gradients) -> bool:
    return all(x is None or is_finite(x) for x in gradients)


def _no_numbers(block: RowBlock, bad: Tensor, gradients: Gradients, node: ir.Attend) -> NDArray[np.bool_]:
    """Return the rows that are spoiled in all heads and whose query gradient is NaN even without hidden keys."""
    if node.keys is not None or read_elsewhere(node) or not gradients or gradients[0] is None:
        return np.zeros(len(block.rows), dtype=np.bool_)
    return (bad & gradients[0].flatten(2).isnan().all(-1)).all(0).numpy(force=True)


def _beyond_rows(rows: RowData) -> Tensor | None:
    """Return the rows (heads, rows) whose gradients or results are not finite."""
    masks = [beyond(x.flatten(2) if x.ndim > 2 else x[..., None]) for x in rows[:3] if x is not None]
    masks += [] if rows.lse is None else [rows.lse.isnan()]
    return torch.stack(masks).any(0) if masks else None


class _BlockFunction(FirstOrder):
    """The autograd function of attention by blocks; saved: q, k, v, the results that the work keeps, and the inputs."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: PlannedCall, make: MakeWork, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        work = make(call, q, k, [x.detach() for x in inputs])
        out, relative_lse, shift = _rows((q, k, v), call, inputs, work)
        lse = relative_lse if shift is None else relative_lse + shift
        kept: list[Tensor] = []
        if work.keeps_results:
            out = out.to(q.dtype)
            kept = [out, relative_lse] if shift is None else [out, relative_lse, shift]
        ctx.call, ctx.make, ctx.kept = call, make, len(kept)
        keep_name(ctx)
        ctx.save_for_backward(q, k, v, *kept, *inputs)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[5:]
        with backward_row(ctx):
            gradients = once(_gradients, (ctx.call, ctx.make, ctx.kept), needs, grad_out, grad_lse, *ctx.saved_tensors)
        return (*gradients[:3], None, None, *gradients[3:])


def _gradients(
    state: tuple[PlannedCall, MakeWork, int],
    needs: Sequence[bool],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    *saved: Tensor,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of q, k, v, and of the floating-point inputs that need them."""
    call, make, kept = state
    q, k, v, *rest = (x.detach() for x in saved)
    leaves = [x.requires_grad_(need) for x, need in zip(rest[kept:], needs, strict=True)]
    work = make(call, q, k, leaves)
    sums, of_inputs = _row_gradients(RowData(grad_out, grad_lse, *rest[:kept]), (q, k, v), call, leaves, work)
    remaining = iter(of_inputs)
    input_grads = [next(remaining).to(x.dtype) if need else None for x, need in zip(leaves, needs, strict=True)]
    return (*(sums[name].to(q.dtype) for name in ("q", "k", "v")), *input_grads)


def attend(q: Tensor, k: Tensor, v: Tensor, call: PlannedCall, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) of an attention with custom weights, values or keys, differentiable once; see `forward`."""
    return by_blocks(q, k, v, call, inputs, in_torch)


def by_blocks(
    q: Tensor, k: Tensor, v: Tensor, call: PlannedCall, inputs: Sequence[Tensor], make: MakeWork
) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) of an attention by the work that `make` returns, differentiable once."""
    return cast("tuple[Tensor, Tensor]", _BlockFunction.apply(q, k, v, call, make, *inputs))  # type: ignore[no-untyped-call]
