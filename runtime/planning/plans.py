"""Plans by call shape and the data that the relation reads: kept by a `Planner`, bounded, thread-safe."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import record_function

from attnc.compiler.ir import Pattern
from attnc.compiler.ir.value_nodes import is_plain, values_of
from attnc.compiler.planning.build_plan import CallShape, build_plan
from attnc.compiler.planning.cache_need import CacheNeed, cache_need
from attnc.compiler.planning.cpu_plan import Plan
from attnc.compiler.planning.recipes import covered, read_recipe
from attnc.compiler.planning.schedule import CoverChoice, CoverProblem, choose
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.call.tensor_checks import (
    TensorSizes,
    call_shape,
    check_tensors,
    ids_of_documents,
    names_read,
)
from attnc.runtime.executors.cpu.cpu_memory import memory_of
from attnc.runtime.executors.cpu.direct import Direct
from attnc.runtime.planning import stored_rates
from attnc.runtime.planning.call_relations import documents_of_call, relations_of
from attnc.runtime.process.recent import Recent, held_bytes
from attnc.runtime.settings import SETTINGS

if TYPE_CHECKING:
    from attnc.runtime.choices.tuned import Tuned

__all__ = ["PLANNING", "Planner", "by_option", "cache_of", "documents_of_call", "name_of", "need_of", "planning"]
__all__ += ["relations_of", "runs_in"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

PLANNING = "attnc::plan"
"""The name of planning in a profiler."""


def planning() -> AbstractContextManager[object]:
    """Return a context that shows planning to a profiler, but not to a trace, in which plans are no operations."""
    return nullcontext() if torch._C._is_tracing() else record_function(PLANNING)


_SHORT = 256
"""Input data of up to this many bytes is its own cache key."""


class Planner:
    """The plans of one pattern, whose `identity` is `text`.

    `strict`: raise UnsupportedError where no tile plan exists. `direct`: the last call that was nothing but one kernel
    call. `direct` and `_last` are replaced atomically by immutable values, so a reader may see either value; both are
    valid. `tuned`: the choices made by measurement; None: the cost model decides everything. `knob`: the name of this
    attention's choice among them.
    """

    def __init__(self, text: str, pattern: Pattern, strict: bool, tuned: Tuned | None = None, knob: str = "") -> None:
        self.text = text
        self.pattern = pattern
        self.strict = strict
        self.tuned = tuned
        self.knob = knob
        self._by_shape: Recent[Plan] = Recent(SETTINGS.plans, SETTINGS.plan_bytes, _bytes_of_plan)
        self._last: tuple[Hashable, Plan] | None = None
        self.direct: Direct | None = None
        self._parts: dict[object, object] = {}
        self._by_tensors: Recent[Plan] = Recent(SETTINGS.plans, SETTINGS.plan_bytes, _bytes_of_plan)
        self._kept: Recent[Any] = Recent(SETTINGS.plans, SETTINGS.plan_bytes, held_bytes)
        read = names_read(pattern)
        ids = ids_of_documents(pattern)
        self._name = [
            runs_in if tensor.name == ids else _contents if tensor.name in read else None for tensor in pattern.tensors
        ]

    def part(self, make: Callable[[Planner], T]) -> T:
        """Return what an executor keeps for this pattern: the result of `make(self)`, made once."""
        part = self._parts.get(make)
        return cast("T", self._parts.setdefault(make, make(self)) if part is None else part)

    def plan(self, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of a call of these sizes with these inputs.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError, SpecError, EvaluationError.
        """
        shape = call_shape(self.pattern, sizes, inputs)
        if self.tuned is None:
            return self._by_shape.get((sizes, *self._names(shape)), lambda: self._build(shape))
        option = self.tuned.option(self.knob, sizes, "cpu")
        key = (self.tuned.state, option, sizes, *self._names(shape))
        return self._by_shape.get(key, lambda: self._by_option(shape, sizes, option))

    def _by_option(self, shape: CallShape, sizes: TensorSizes, option: str | None) -> Plan:
        """Return the plan by the tuned choice, with the reason."""
        assert self.tuned is not None
        taken: list[bool] = []
        plan = self._build(shape, by_option(option, taken.append))
        why = self.tuned.why(self.knob, sizes, "cpu")
        if option is not None and not any(taken):
            why = f"the tuned choice `{option}` is not available here: the model's choice"
        return replace(plan, reasons=(why, *plan.reasons))

    def kept(self, name: Hashable, shape: CallShape, make: Callable[[], T]) -> T:
        """Return the cached object of this name for inputs like these, made by `make` on a miss."""
        return cast("T", self._kept.get((name, *self._names(shape)), make))

    def remembered(self, name: Hashable, make: Callable[[], T]) -> T:
        """Return the cached object of this name, whatever the call, made by `make` on a miss."""
        return cast("T", self._kept.get(name, make))

    def _names(self, shape: CallShape) -> list[Hashable]:
        """Return a key of the data that the relation reads, and of the sizes that inputs decide."""
        named = zip(self.pattern.tensors, self._name, strict=True)
        data = [name(shape.inputs[tensor.name]) for tensor, name in named if name is not None]
        return [*data, tuple(sorted(shape.sizes.items()))]

    def plan_of(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Plan:
        """Return the plan of a call on q, k, v and the pattern's inputs in order, after checks. Raises as `plan`.

        Tensors with shapes and dtypes seen before have passed every check and are not checked again.
        """
        key: tuple[Hashable, ...] = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype)
        if self.tuned is not None:
            key = (*key, self.tuned.state)
        if inputs:
            key = (*key, *[_name_by(x, name) for x, name in zip(inputs, self._name, strict=False)])
        last = self._last
        if last is None or last[0] != key:
            self._last = last = (key, self._by_tensors.get(key, lambda: self._checked(q, k, v, inputs)))
        return last[1]

    def _checked(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Plan:
        names = [tensor.name for tensor in self.pattern.tensors]
        if len(names) != len(inputs):
            raise ArgumentError(f"`{self.pattern.name}` has {len(names)} inputs, got {len(inputs)}")
        return self.plan(check_tensors(q, k, v), dict(zip(names, inputs, strict=True)))

    def _build(self, shape: CallShape, choice: Callable[[CoverProblem], CoverChoice] = choose) -> Plan:
        with planning():
            began = perf_counter()
            bare_plan = build_plan(relations_of(self.pattern, shape), choice, stored_rates.rates())
        ms, sizes = 1e3 * (perf_counter() - began), f"{shape.n_q} × {shape.n_k}"
        _log.debug("`%s` at %s: planned in %.1f ms, %s", self.pattern.name, sizes, ms, bare_plan.schedule)
        plan = replace(bare_plan, cache_of=cache_of(self.pattern, shape.heads, shape.kv_heads))
        if is_plain(self.pattern.attend):
            plan = replace(plan, memory_of=partial(memory_of, bare_plan, shape.dk, shape.dv, shape.dtype))
        if self.strict and plan.fallback is not None:
            raise UnsupportedError(
                f"strict: `{self.pattern.name}` has no tile plan at {shape.n_q} × {shape.n_k} ({plan.fallback}); it "
                f"would run {plan.schedule}; compile it without strict to allow that"
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


def cache_of(pattern: Pattern, heads: int, kv_heads: int) -> Callable[[], CacheNeed | None]:
    """Return a function that finds the cache need on its first call."""
    return partial(need_of, pattern, heads, max(heads // max(kv_heads, 1), 1))


def need_of(pattern: Pattern, heads: int, group: int) -> CacheNeed | None:
    """Return `cache_need`, computed once per key."""
    nodes = tuple((node.visible, node.keys, node.family, *values_of(node)) for node in pattern.nodes)
    key = (nodes, pattern.combine, pattern.lse, pattern.documents, pattern.segments, pattern.head_lists, heads, group)
    return _NEEDS.get(key, lambda: cache_need(pattern, heads, group))


_NEEDS: Recent[CacheNeed | None] = Recent(SETTINGS.specs)


def name_of(tensor: Tensor, is_read: bool) -> Hashable:
    """Return a cache key of an input: its data where the relation reads it, else its shape."""
    return _name_by(tensor, _contents if is_read else None)


def _name_by(tensor: Tensor, name: Callable[[NDArray[Any]], Hashable] | None) -> Hashable:
    return (tensor.shape, tensor.dtype) if name is None else name(tensor.detach().cpu().numpy())


def runs_in(ids: NDArray[Any]) -> Hashable:
    """Return a key of the documents in an array of ids: the starts of runs of equal ids, and ids that come back.

    It takes a byte for each token, and no copy of the ids.
    """
    if ids.nbytes <= _SHORT or not ids.size:
        return ids.shape, ids.dtype, ids.tobytes()
    rows = np.atleast_2d(ids)
    row, before = np.nonzero(rows[:, 1:] != rows[:, :-1])
    at = np.append(np.arange(len(rows)), row)
    first = np.append(rows[:, 0], rows[row, before + 1])
    order = np.lexsort((first, at))
    again = (np.diff(at[order]) == 0) & (first[order][1:] == first[order][:-1])
    distinguishing = (row, before, first) if again.any() else (row, before)
    return ids.shape, hashlib.sha256(b"".join(x.tobytes() for x in distinguishing)).digest()


def _contents(array: NDArray[np.generic]) -> Hashable:
    """Return a cache key of an array's data."""
    if array.nbytes <= _SHORT:
        return array.shape, array.dtype, array.tobytes()
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return array.shape, array.dtype, hashlib.sha256(data).digest()  # in hardware on most machines
