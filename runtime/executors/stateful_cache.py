"""Patterns with branches that have a state, against a cache: the keys in the cache, the states passed by the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.compiler.passes.attentions import inputs_of_attentions
from attnc.runtime.call.arguments import CallArguments, read_call
from attnc.runtime.call.caches import Cache
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.call.length_groups import LengthGroup, length_groups, order_of
from attnc.runtime.call.tensor_checks import check_tensors, input_tensors
from attnc.runtime.executors.executor_protocol import PartRunner, Results, States
from attnc.runtime.executors.pattern_attentions import PatternAttentions
from attnc.runtime.executors.pattern_parts import attentions_of
from attnc.runtime.planning.cache_arguments import CacheArguments
from attnc.runtime.planning.plans import Planner

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence

BY_TOKEN = frozenset({"token", "key"})


def states_before(
    attentions: PatternAttentions, sizes: Mapping[str, int], batch: int, heads: int, like: Tensor
) -> States:
    """Return the states of all branches before the first token, `branch.state` (of a family: `branch[0].state`)."""
    states: States = {}
    for branch in attentions.stateful:
        branch_states = branch.beginning(sizes, batch, heads, like)
        states |= {f"{_prefix(branch)}{name}": x for name, x in branch_states.items()}
    return states


def run_with_states(
    rows: Planner, call: CacheArguments, runner: PartRunner, reader: Callable[[Cache], PartRunner] | None = None
) -> Results:
    """Return out of the last queries, and the states after them; `rows`: the planner of the pattern's last rows.

    The last tokens of the cache are those that the states have not seen. Inputs that only branches with a state read
    may have entries for these tokens alone. `reader`: runs attentions on the cache in place, without a gradient.

    Raises the errors of a call.
    """
    pattern, state = rows.pattern, call.state
    if not isinstance(state, Mapping):
        raise ArgumentTypeError(
            f"`{pattern.name}` has branches with a state: pass `state`, at first attend.init_state(batch, heads, "
            f"dk, dv); the result is (out, state)"
        )
    dtype = call.q.dtype
    call = call.on(*runner.operands(pattern, call.q, call.k, call.v))
    serving = _Serving(attentions_of(rows), pattern, call, runner, reader, inputs_of_attentions(pattern))
    groups = list(length_groups(pattern, call.cache(pattern), call.inputs))
    outs, after = zip(*(serving.run(group, state) for group in groups), strict=True)
    order = order_of(groups).to(call.q.device)
    states = {name: torch.cat([last[name] for last in after])[order.to(x.device)] for name, x in after[0].items()}
    out = outs[0] if len(outs) == 1 else torch.cat(outs)[order]
    return Results(out.to(dtype), None, states)


@dataclass(frozen=True)
class _Serving:
    """The parts of a pattern and the arguments of one call; `of_attentions`: inputs that attentions read."""

    attentions: PatternAttentions
    pattern: Pattern
    call: CacheArguments
    runner: PartRunner
    reader: Callable[[Cache], PartRunner] | None
    of_attentions: frozenset[str]

    def run(self, group: LengthGroup, state: Mapping[str, Tensor]) -> tuple[Tensor, States]:
        """Return out and the states of the batch entries of one length."""
        q, entries, length = self.call.q, list(group.entries), group.length
        group_q, cache, count = q[entries], group.cache, q.shape[2]
        k, v = cache.gathered(range(len(entries)), np.arange(length - count, length))
        new = {name: self._last(name, x, count) for name, x in group.inputs.items()}
        factor = float(check_tensors(group_q, k, v).dk ** -0.5) if self.call.scale is None else self.call.scale
        tensors = dict(zip((t.name for t in self.pattern.tensors), input_tensors(self.pattern, new), strict=True))
        outs: list[Tensor] = []
        after: States = {}
        for branch in self.attentions.stateful:
            prefix = _prefix(branch)
            begun = {name.removeprefix(prefix): x[entries] for name, x in state.items() if name.startswith(prefix)}
            out, last = self.runner.recurrence(branch, CallArguments(group_q, k, v, new, tensors, factor, state=begun))
            outs.append(out)
            after |= {f"{prefix}{name}": x for name, x in last.items()}
        unknown = state.keys() - after.keys()
        if unknown:
            raise ArgumentError(f"state has {', '.join(map(str, unknown))}: expected {', '.join(after)}")
        return self._attentions(group_q, group, factor, self.attentions.by_branch(outs)), after

    def _attentions(self, q: Tensor, group: LengthGroup, factor: float, states: Mapping[str, Tensor]) -> Tensor:
        cache, length = group.cache, group.length
        in_place = self.reader is not None and not self.attentions.needs_keys
        k, v = cache.placeholders(length) if in_place else cache.whole(range(len(group.entries)), length)
        inputs = {name: self._whole(name, x, length) for name, x in group.inputs.items()}
        runner = self.runner if self.reader is None else self.reader(cache)
        return self.attentions.run(read_call(self.pattern, q, k, v, factor, inputs, states=states), runner)[0]

    def _axes(self, name: str) -> list[int]:
        """Return the axes in which an input has an entry for each token."""
        tensor = next((tensor for tensor in self.pattern.tensors if tensor.name == name), None)
        return [] if tensor is None else [axis for axis, dim in enumerate(tensor.dims) if dim in BY_TOKEN]

    def _last(self, name: str, x: Any, count: int) -> Any:
        """Return an input cut to the last tokens."""
        for axis in self._axes(name):
            at: list[Any] = [slice(None)] * len(x.shape)
            at[axis] = slice(max(x.shape[axis] - count, 0), None)
            x = x[tuple(at)]
        return x

    def _whole(self, name: str, x: Any, length: int) -> Any:
        """Return an input for attentions; an input that they do not read may have entries for the last tokens alone."""
        axes = self._axes(name)
        if not axes or name in self.of_attentions:
            return x
        shape = [length if axis in axes else size for axis, size in enumerate(x.shape)]
        return torch.as_tensor(x).new_zeros(()).expand(shape)


def _prefix(branch: PatternRecurrence) -> str:
    member = "" if branch.recur.member is None else f"[{branch.recur.member}]"
    return f"{branch.recur.name}{member}."


__all__ = ["States", "run_with_states", "states_before"]
