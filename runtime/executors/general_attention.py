"""Attention with its own scores, weights, values or branches, in torch, from a planner and tensors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.value_nodes import is_plain
from attnc.compiler.planning.cpu_plan import Plan
from attnc.runtime.call.call_inputs import CallInputs
from attnc.runtime.call.tensor_checks import call_shape, check_tensors
from attnc.runtime.executors.cpu import scored_attention
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.executors.cpu.planned_call import PlannedCall
from attnc.runtime.executors.pattern_executor import PatternExecutor
from attnc.runtime.planning.branch_relations import is_single
from attnc.runtime.planning.plans import Planner, relations_of
from attnc.runtime.process.profiling import NamedCall

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence

Result = tuple[Tensor, "Tensor | None"]


@dataclass(frozen=True)
class GeneralAttention:
    """The attention of a planner; `steps`: the executor of its parts, None for one softmax over tokens.

    `recurrent`: the recurrence, for a pattern that is one.
    """

    planner: Planner
    steps: PatternExecutor | None
    recurrent: PatternRecurrence | None = None

    @property
    def pattern(self) -> ir.Pattern:
        """The pattern that is computed."""
        return self.planner.pattern

    @property
    def is_plain(self) -> bool:
        """Whether the pattern is the softmax of `scale * dot(q, k)`, which the operator `attnc::attend` computes."""
        return self.recurrent is None and self.steps is None and is_plain(self.pattern.attend)

    @property
    def has_lse(self) -> bool:
        """Whether the result is one softmax, which has a log-sum-exp."""
        return self.recurrent is None and (self.steps is None or self.steps.has_lse)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Mapping[str, object],
        tensors: Sequence[Tensor],
        scale: float | None,
        *,
        by_kernels: bool,
    ) -> Result:
        """Return (out, lse), differentiable once, in q, k, v and real inputs; lse is None where there is none.

        `inputs`: the inputs as passed; `tensors`: the same inputs in the pattern's order. `by_kernels`: use Triton
        kernels.
        """
        if self.recurrent is not None:
            return self.recurrent.attend(q, k, v, inputs, tensors, scale, by_kernels=by_kernels)[0], None
        with NamedCall(self.pattern.name):
            sizes = check_tensors(q, k, v)
            factor = float(sizes.dk**-0.5) if scale is None else scale
            if self.steps is not None:
                named = {t.name: x for t, x in zip(self.pattern.tensors, tensors, strict=True)}
                call = CallInputs(sizes, inputs, named, factor)
                return self.steps.on_gpu(q, k, v, call) if by_kernels else self.steps.on_cpu(q, k, v, call)
            real = [x for x, tensor in zip(tensors, self.pattern.tensors, strict=True) if tensor.is_floating]
            relations = relations_of(self.pattern, call_shape(self.pattern, sizes, inputs))
            if by_kernels:
                from attnc.runtime.executors.triton import scored_on_gpu  # only where kernels run

                return scored_on_gpu.attend(q, k, v, relations, factor, self.planner, real, list(tensors))
            planned = PlannedCall(cpu_plans(self.planner).plan_of(q, k, v, tensors), relations, factor)
            return scored_attention.attend(q, k, v, planned, real)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Plan:
        """Return the plan of a call on the CPU."""
        sizes, inputs = check_tensors(q, k, v), self.named(tensors)
        return cpu_plans(self.planner).plan(sizes, inputs) if self.steps is None else self.steps.plan(sizes, inputs)

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the inputs by name."""
        return {tensor.name: x for tensor, x in zip(self.pattern.tensors, tensors, strict=True)}


def general_of(planner: Planner) -> GeneralAttention:
    """Return the attention of a planner."""
    pattern = planner.pattern
    if pattern.recur is not None:
        from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence  # only for recurrences

        recur = pattern.recur
        recurrent = planner.remembered("recurrence", lambda: PatternRecurrence(pattern, recur, strict=planner.strict))
        return GeneralAttention(planner, None, recurrent)
    return GeneralAttention(planner, None if is_single(pattern) else steps_of(planner))


def steps_of(planner: Planner) -> PatternExecutor:
    """Return the executor of a planner's pattern. Raises UnsupportedError where `strict` refuses the pattern."""
    return planner.remembered(
        "steps", lambda: PatternExecutor(planner.text, planner.pattern, planner.strict, planner.tuned)
    )
