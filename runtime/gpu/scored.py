"""Attention with scores of its own by kernels, differentiable once in q, k, v and the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from attnc.compiler.kernels.scores import find_score
from attnc.runtime.cpu.autograd import FirstOrder, Pair
from attnc.runtime.cpu.planned_call import Call
from attnc.runtime.errors import UnsupportedError
from attnc.runtime.gpu.executor import Executor
from attnc.runtime.gpu.planner import GpuPlanner
from attnc.runtime.gpu.terms import Given


def attend(
    q: Tensor, k: Tensor, v: Tensor, call: Call, planner: GpuPlanner, inputs: Sequence[Tensor], given: Sequence[Tensor]
) -> Pair:
    """(out, lse) of a pattern; `inputs` are its real ones, `given` all of them.

    Raises UnsupportedError where there are no kernels.
    """
    score = find_score(call.relations.pattern.attend)
    for tensor in score.inputs:
        if next(x for t, x in zip(call.relations.pattern.tensors, given, strict=True) if t is tensor).requires_grad:
            raise UnsupportedError(
                f"the gradient of `{tensor.name}`, which is read pair by pair, has no kernel yet: use "
                f'backend="reference", or the CPU'
            )
    made = Given(call, q, k, v, inputs)
    own_q, own_k, own_v = made.vectors(score)
    terms = made.terms(score)
    widths = q.shape[3], v.shape[3]
    prepared = planner.prepared(own_q, own_k, own_v, given, widths)
    executor = Executor(prepared, call.scale)
    return cast("Pair", _Scored.apply(own_q, own_k, own_v, executor, tuple(terms), *terms.values()))  # type: ignore[no-untyped-call]


class _Scored(FirstOrder):
    """Kernels, recorded."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, executor: Executor, names: tuple[str, ...], *terms: Tensor
    ) -> Pair:
        pair = executor.forward(q, k, v, dict(zip(names, terms, strict=True)))
        ctx.executor, ctx.names = executor, names
        ctx.save_for_backward(q, k, v, *pair, *terms)
        ctx.set_materialize_grads(False)
        return pair

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return (None,) * len(needs)
        q, k, v, out, lse, *terms = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        named = dict(zip(ctx.names, terms, strict=True))
        triple, of_terms = ctx.executor.backward(grad_out, grad_lse, (q, k, v, out, lse), named)
        found = [_gradient(of_terms.get(name), x) for name, x in named.items()]
        grads = [*triple, None, None, *found]
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _gradient(grad: Tensor | None, term: Tensor) -> Tensor | None:
    """The gradient of a term from that of every batch entry and head."""
    return None if grad is None else grad.sum_to_size(term.shape)
