"""The parts of a pattern: one attention, several with their branches, or a recurrence; and calls of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.compiler.ir.value_nodes import is_plain
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.tensor_checks import TensorSizes
from attnc.runtime.executors.executor_protocol import PartRunner, Results
from attnc.runtime.executors.pattern_attentions import PatternAttentions
from attnc.runtime.planning.branch_relations import is_single
from attnc.runtime.planning.plans import Planner
from attnc.runtime.process.profiling import NamedCall

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence


NOT_TRANSFORMED = (
    "torch.func transforms of a pattern with its own scores, weights or branches are not supported: use "
    'torch.autograd, or the reference executor, backend="reference"'
)


@dataclass(frozen=True)
class PatternParts:
    """The parts of a pattern.

    `attentions`: several attentions, or one that selects; None for one softmax over tokens. `recurrence`: for a pattern
    that is one. `is_plain`: whether the pattern is the softmax of `scale * dot(q, k)`, which the operator
    `attnc::attend` computes. `has_lse`: whether the result is one softmax.
    """

    name: str
    attentions: PatternAttentions | None
    recurrence: PatternRecurrence | None
    is_plain: bool
    has_lse: bool

    @property
    def recurrences(self) -> Sequence[PatternRecurrence]:
        """The recurrences with states: the pattern itself, or its branches with a state."""
        if self.attentions is not None:
            return self.attentions.stateful
        return () if self.recurrence is None else (self.recurrence,)


def parts_of(planner: Planner) -> PatternParts:
    """Return the parts of a planner's pattern. Raises UnsupportedError where `strict` refuses the pattern."""
    return planner.part(_parts_of)


def _parts_of(planner: Planner) -> PatternParts:
    pattern = planner.pattern
    if pattern.recur is not None:
        from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence  # only for recurrences

        recurrence = PatternRecurrence(pattern, pattern.recur, strict=planner.strict)
        return PatternParts(pattern.name, None, recurrence, is_plain=False, has_lse=False)
    if is_single(pattern):
        return PatternParts(pattern.name, None, None, is_plain=is_plain(pattern.attend), has_lse=True)
    attentions = attentions_of(planner)
    return PatternParts(pattern.name, attentions, None, is_plain=False, has_lse=attentions.has_lse)


def is_plain_pattern(pattern: Pattern) -> bool:
    """Check whether a pattern is the softmax of `scale * dot(q, k)` over tokens."""
    return pattern.recur is None and is_single(pattern) and is_plain(pattern.attend)


def attentions_of(planner: Planner) -> PatternAttentions:
    """Return the attentions of a planner's pattern. Raises UnsupportedError where `strict` refuses the pattern."""
    return planner.part(_attentions_of)


def _attentions_of(planner: Planner) -> PatternAttentions:
    return PatternAttentions(planner.text, planner.pattern, planner.strict, planner.tuned)


def run_parts(planner: Planner, call: CallArguments, runner: PartRunner) -> Results:
    """Compute a call, each part by `runner`."""
    parts = parts_of(planner)
    if parts.recurrence is not None:
        out, states = runner.recurrence(parts.recurrence, call)
        return Results(out, None, states)
    with NamedCall(parts.name):
        if parts.attentions is None:
            return Results(*runner.attention(planner, call, call.tensors))
        return Results(*parts.attentions.run(call, runner))


def plan_parts(planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object], runner: PartRunner) -> Plan:
    """Return the plan of a call, each part planned by `runner`."""
    attentions = parts_of(planner).attentions
    return (
        runner.attention_plan(planner, sizes, inputs) if attentions is None else attentions.plan(sizes, inputs, runner)
    )


def recomputed_gradients(
    planner: Planner, call: CallArguments, runner: PartRunner, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v and the real inputs in order, by a second forward that autograd records.

    `gradients`: of out and of the LSE.
    """
    tensors = planner.pattern.tensors
    call_tensors = (call.q, call.k, call.v, *call.tensors_of(planner.pattern))
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in call_tensors]
    q, k, v, *rest = leaves
    named = {tensor.name: x for tensor, x in zip(tensors, rest, strict=True)}
    out, lse, _ = run_parts(planner, CallArguments(q, k, v, named, named, call.scale), runner)
    pairs = [(x, grad) for x, grad in zip((out, lse), gradients, strict=True) if x is not None and grad is not None]
    outputs, grads = zip(*pairs, strict=True)
    wanted = [x for x in leaves if x.requires_grad]
    return torch.autograd.grad(outputs, wanted, grads, materialize_grads=True)
