"""Attention with custom scores by kernels, differentiable once in q, k, v and the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.kernels.score_formula import ScoreFormula, find_score
from attnc.compiler.planning.build_plan import Relations
from attnc.runtime.executors.cpu import row_attention
from attnc.runtime.executors.cpu.autograd import FirstOrder, Pair, once
from attnc.runtime.executors.triton.gpu_executor import ScaledKernels
from attnc.runtime.executors.triton.gpu_work import in_tiles, note_tiles
from attnc.runtime.executors.triton.planner import GpuPlanner, gpu_planner
from attnc.runtime.executors.triton.score_operands import ScoreOperands
from attnc.runtime.planning.plans import Planner
from attnc.runtime.process.profiling import backward_row, keep_name


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relations: Relations,
    scale: float,
    planner: Planner,
    inputs: Sequence[Tensor],
    all_inputs: Sequence[Tensor],
) -> Pair:
    """Compute (out, lse) of a pattern; `inputs` are its floating-point inputs.

    Without kernels the call runs as tiles in torch; under strict it raises UnsupportedError.
    """
    try:
        return _by_kernels(q, k, v, relations, scale, gpu_planner(planner), inputs, all_inputs)
    except NotInKernelsError as error:
        call = in_tiles(planner, q, k, v, all_inputs, scale, error)
        note_tiles(planner, error)
        return row_attention.attend(q, k, v, call, inputs)


def _by_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relations: Relations,
    scale: float,
    planner: GpuPlanner,
    inputs: Sequence[Tensor],
    all_inputs: Sequence[Tensor],
) -> Pair:
    score = find_score(relations.pattern.attend)
    operands = ScoreOperands(relations, scale, q, k, v, inputs)
    q_vectors, k_vectors, v_vectors = operands.vectors(score)
    prepared = planner.prepared(q_vectors, k_vectors, v_vectors, all_inputs, (q.shape[3], v.shape[3]))
    if torch.is_grad_enabled():
        prepared.kernels.check_gradients([t.name for t, x in _tables(relations, score, all_inputs) if x.requires_grad])
    terms = operands.terms(score)
    tables = {tensor.name: x for tensor, x in _tables(relations, score, all_inputs)}
    executor = ScaledKernels(prepared, scale)
    more = {**terms, **tables}
    result = _Scored.apply(q_vectors, k_vectors, v_vectors, executor, tuple(terms), tuple(tables), *more.values())  # type: ignore[no-untyped-call]
    return cast("Pair", result)


def _tables(relations: Relations, score: ScoreFormula, all_inputs: Sequence[Tensor]) -> list[tuple[ir.Tensor, Tensor]]:
    """Return the inputs that are read pair by pair."""
    return [(t, x) for t, x in zip(relations.pattern.tensors, all_inputs, strict=True) if t in score.inputs]


class _Scored(FirstOrder):
    """The kernels as an autograd function."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        executor: ScaledKernels,
        names: tuple[str, ...],
        tables: tuple[str, ...],
        *more: Tensor,
    ) -> Pair:
        pair = executor.forward(q, k, v, dict(zip(names, more, strict=False)))
        ctx.executor, ctx.names, ctx.tables = executor, names, tables
        keep_name(ctx)
        ctx.save_for_backward(q, k, v, *pair, *more)
        ctx.set_materialize_grads(False)
        return pair

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return (None,) * len(needs)
        kept = ctx.saved_tensors
        grad_out = torch.zeros_like(kept[3]) if grad_out is None else grad_out
        executor, names = ctx.executor, ctx.names
        wanted = [name for name, need in zip(ctx.tables, needs[6 + len(names) :], strict=True) if need]

        def of_inputs(grad_out: Tensor, grad_lse: Tensor | None, *kept: Tensor) -> tuple[Tensor | None, ...]:
            q, k, v, out, lse, *more = kept
            named = dict(zip(names, more, strict=False))
            tables = dict(zip(ctx.tables, more[len(named) :], strict=True))
            triple, of_terms = executor.backward(grad_out, grad_lse, (q, k, v, out, lse), named, wanted)
            gradients = [_term_gradient(of_terms.get(name), x) for name, x in named.items()]
            gradients += [_table_gradient(of_terms.get(name), x, executor.tensor(name)) for name, x in tables.items()]
            return (*triple, *gradients)

        with backward_row(ctx):
            gradients = once(of_inputs, grad_out, grad_lse, *kept)
        grads = [*gradients[:3], None, None, None, *gradients[3:]]
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _term_gradient(grad: Tensor | None, term: Tensor) -> Tensor | None:
    """Reduce the gradient by batch entry and head to the shape of a term."""
    return None if grad is None else grad.sum_to_size(term.shape)


def _table_gradient(grad: Tensor | None, table: Tensor, tensor: ir.Tensor) -> Tensor | None:
    """Reduce the gradient by batch entry and head, (B, Hq, entries), to the shape of an input."""
    if grad is None:
        return None
    if "kv_head" in tensor.dims:
        heads = table.shape[tensor.dims.index("kv_head")]
        grad = grad.reshape(grad.shape[0], heads, -1, grad.shape[2]).sum(2)
    axis_of_dim = {"batch": 0, "head": 1, "kv_head": 1}
    kept = [axis_of_dim.get(str(dim), 2) for dim in tensor.dims]
    over = [place for place in (0, 1) if place not in kept]
    grad = grad.sum(over) if over else grad
    order = sorted(kept)
    return grad.permute([order.index(place) for place in kept]).sum_to_size(table.shape).to(table.dtype)
