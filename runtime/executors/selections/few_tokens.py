"""Attention with selections over few tokens, computed for all heads and batch entries at once."""

from __future__ import annotations

from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.tensor_checks import call_shape
from attnc.runtime.executors.cpu.autograd import Pair, differentiable
from attnc.runtime.executors.cpu.masked import Masked, has_few_tokens, seen_pairs
from attnc.runtime.planning.plans import Planner, relations_of


def attend(planner: Planner, call: CallArguments) -> Pair | None:
    """Compute (out, lse) on a CPU, differentiable once; return None without a selection, or for many tokens.

    Raises EvaluationError if the relation is undefined somewhere.
    """
    pattern, (q, k, v) = planner.pattern, (call.q, call.k, call.v)
    if not pattern.chooses or pattern.documents is not None or not has_few_tokens(q, k, v):
        return None
    relations = relations_of(pattern, call_shape(pattern, call.sizes, call.inputs))
    return differentiable(q, k, v, Masked(call.scale), [seen_pairs(relations)])
