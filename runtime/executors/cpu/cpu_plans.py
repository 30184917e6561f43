"""Plans of the CPU executor by call shape and the data that the relation reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

from torch import Tensor

from attnc.compiler.ir.value_nodes import is_plain
from attnc.compiler.planning.build_plan import CallShape, build_plan
from attnc.compiler.planning.cpu_plan import Plan
from attnc.compiler.planning.recipes import covered, read_recipe
from attnc.compiler.planning.schedule import CoverChoice, CoverProblem, choose
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.call.tensor_checks import TensorSizes, call_shape, check_tensors
from attnc.runtime.executors.cpu.cpu_memory import memory_of
from attnc.runtime.executors.cpu.direct import Direct
from attnc.runtime.planning import stored_rates
from attnc.runtime.planning.call_relations import relations_of
from attnc.runtime.planning.plans import Planner, cache_of, planning
from attnc.runtime.process.recent import Recent
from attnc.runtime.settings import SETTINGS

_log = logging.getLogger(__name__)


def cpu_plans(planner: Planner) -> CpuPlans:
    """Return the plans of a planner's pattern."""
    return planner.part(CpuPlans)


class CpuPlans:
    """The plans of one pattern.

    `direct`: the last call that was nothing but one kernel call. `direct` and `_last` are replaced atomically by
    immutable values, so a reader may see either value; both are valid.
    """

    def __init__(self, planner: Planner) -> None:
        self._pattern, self._strict, self._keys = planner.pattern, planner.strict, planner.input_keys
        self._tuned, self._knob = planner.tuned, planner.knob
        self._by_shape: Recent[Plan] = Recent(SETTINGS.plans, SETTINGS.plan_bytes, _bytes_of_plan)
        self._by_tensors: Recent[Plan] = Recent(SETTINGS.plans, SETTINGS.plan_bytes, _bytes_of_plan)
        self._last: tuple[Hashable, Plan] | None = None
        self.direct: Direct | None = None

    def plan(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of a call of these sizes with these inputs.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError, SpecError, EvaluationError.
        """
        shape = call_shape(self._pattern, sizes, inputs)
        if self._tuned is None:
            return self._by_shape.get((sizes, *self._keys.of_shape(shape)), lambda: self._build(shape))
        option = self._tuned.option(self._knob, sizes, "cpu")
        key = (self._tuned.state, option, sizes, *self._keys.of_shape(shape))
        return self._by_shape.get(key, lambda: self._by_option(shape, sizes, option))

    def _by_option(self, shape: CallShape, sizes: TensorSizes, option: str | None) -> Plan:
        """Return the plan by the tuned choice, with the reason."""
        assert self._tuned is not None
        taken: list[bool] = []
        plan = self._build(shape, by_option(option, taken.append))
        why = self._tuned.why(self._knob, sizes, "cpu")
        if option is not None and not any(taken):
            why = f"the tuned choice `{option}` is not available here: the model's choice"
        return replace(plan, reasons=(why, *plan.reasons))

    def plan_of(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Plan:
        """Return the plan of a call on q, k, v and the pattern's inputs in order, after checks. Raises as `plan`.

        Tensors with shapes and dtypes seen before have passed every check and are not checked again.
        """
        key: tuple[Hashable, ...] = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype)
        if self._tuned is not None:
            key = (*key, self._tuned.state)
        if inputs:
            key = (*key, *self._keys.of_tensors(inputs))
        last = self._last
        if last is None or last[0] != key:
            self._last = last = (key, self._by_tensors.get(key, lambda: self._checked(q, k, v, inputs)))
        return last[1]

    def _checked(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Plan:
        names = [tensor.name for tensor in self._pattern.tensors]
        if len(names) != len(inputs):
            raise ArgumentError(f"`{self._pattern.name}` has {len(names)} inputs, got {len(inputs)}")
        return self.plan(check_tensors(q, k, v), dict(zip(names, inputs, strict=True)))

    def _build(self, shape: CallShape, choice: Callable[[CoverProblem], CoverChoice] = choose) -> Plan:
        with planning():
            began = perf_counter()
            bare_plan = build_plan(relations_of(self._pattern, shape), choice, stored_rates.rates())
        ms, sizes = 1e3 * (perf_counter() - began), f"{shape.n_q} × {shape.n_k}"
        _log.debug("`%s` at %s: planned in %.1f ms, %s", self._pattern.name, sizes, ms, bare_plan.schedule)
        plan = replace(bare_plan, cache_of=cache_of(self._pattern, shape.heads, shape.kv_heads))
        if is_plain(self._pattern.attend):
            plan = replace(plan, memory_of=partial(memory_of, bare_plan, shape.dk, shape.dv, shape.dtype))
        if self._strict and plan.fallback is not None:
            raise UnsupportedError(
                f"strict: `{self._pattern.name}` has no tile plan at {shape.n_q} × {shape.n_k} "
                f"({plan.fallback}); it would run {plan.schedule}; compile it without strict to allow that"
            )
        return plan


def by_option(
    option: str | None, note: Callable[[bool], None] = lambda taken: None
) -> Callable[[CoverProblem], CoverChoice]:
    """Return a function that takes the cover of a recipe's name; the model's choice for None or a missing cover.

    `note` is called for each relation with whether it has the cover.
    """
    recipe = None if option is None else read_recipe(option)
    if recipe is None:
        return choose

    def chosen(problem: CoverProblem) -> CoverChoice:
        cover = covered(problem, recipe)
        note(cover is not None)
        return choose(problem) if cover is None else cover

    return chosen


def _bytes_of_plan(plan: Plan) -> int:
    return plan.nbytes
