"""Attention of few tokens that choose, for all heads and batch entries at once."""

from __future__ import annotations

from torch import Tensor

from attnc.runtime.call_inputs import CallInputs
from attnc.runtime.cpu.autograd import Pair, differentiable
from attnc.runtime.cpu.masked import Masked, has_few_tokens, seen_pairs
from attnc.runtime.plans import Planner, relations_of
from attnc.runtime.tensor_checks import call_shape


def attend(planner: Planner, q: Tensor, k: Tensor, v: Tensor, given: CallInputs) -> Pair | None:
    """(out, lse) on a CPU, differentiable once; None for attention that asks no selection, and for many tokens.

    Raises EvaluationError where the relation faults.
    """
    pattern = planner.pattern
    if not pattern.chooses or pattern.documents is not None or not has_few_tokens(q, k, v):
        return None
    relations = relations_of(pattern, call_shape(pattern, given.sizes, given.inputs))
    return differentiable(q, k, v, Masked(given.scale), [seen_pairs(relations)])
