"""Serving of patterns that have branches with a state: keys and values from a cache, states passed on by the caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.compiler.passes.attentions import inputs_of_attentions
from attnc.runtime.call.caches import Cache
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.call.call_inputs import CallInputs
from attnc.runtime.call.length_groups import LengthGroup, length_groups, together
from attnc.runtime.call.tensor_checks import check_tensors, input_tensors
from attnc.runtime.executors.general_attention import steps_of
from attnc.runtime.executors.pattern_executor import PatternExecutor
from attnc.runtime.planning.plans import Planner

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence

States = dict[str, Tensor]
How = Literal["cache", "cpu", "gpu", "reference"]
"""The executor; "cache": attentions read the cache in place, without a gradient."""

BY_TOKEN = frozenset({"token", "key"})


def beginning(steps: PatternExecutor, sizes: Mapping[str, int], batch: int, heads: int, like: Tensor) -> States:
    """Return the states of all branches before the first token, `branch.state` (of a family: `branch[0].state`)."""
    states: States = {}
    for branch in steps.stateful:
        branch_states = branch.beginning(sizes, batch, heads, like)
        states |= {f"{_prefix(branch)}{name}": x for name, x in branch_states.items()}
    return states


def served(
    rows: Planner,
    executor: How,
    q: Tensor,
    cache: Cache,
    scale: float | None,
    inputs: Mapping[str, object],
    state: object,
) -> tuple[Tensor, States]:
    """Return out of the last queries, and the states after them; `rows`: the planner of the pattern's last rows.

    The last tokens of the cache are those that the states have not seen. Inputs that only branches with a state read
    may have entries for these tokens alone.

    Raises the errors of a call.
    """
    if not isinstance(state, Mapping):
        raise ArgumentTypeError(
            f"`{rows.pattern.name}` has branches with a state: pass `state`, at first attend.init_state(batch, heads, "
            f"dk, dv); the result is (out, state)"
        )
    serving = _Serving(steps_of(rows), rows.pattern, executor, scale, inputs_of_attentions(rows.pattern))
    groups = list(length_groups(rows.pattern, cache, inputs))
    outs, after = [], []
    for group in groups:
        out_of_group, last = serving.share(q, group, state)
        outs.append((out_of_group, None))
        after.append(last)
    out, _ = together(q, outs, groups)
    order = torch.tensor([entry for group in groups for entry in group.entries], dtype=torch.int64).argsort()
    return out, {name: torch.cat([last[name] for last in after])[order.to(x.device)] for name, x in after[0].items()}


@dataclass(frozen=True)
class _Serving:
    """The executor of a pattern and the options of one call."""

    steps: PatternExecutor
    pattern: Pattern
    how: How
    scale: float | None
    of_attentions: frozenset[str]
    """Inputs that attentions read, not only branches with a state."""

    def share(self, q: Tensor, group: LengthGroup, state: Mapping[str, Tensor]) -> tuple[Tensor, States]:
        """Return out and the states of the batch entries of one length."""
        entries, count, length = list(group.entries), q.shape[2], group.length
        group_q, cache = q[entries], group.cache
        k, v = cache.gathered(range(len(entries)), np.arange(length - count, length))
        factor = float(check_tensors(group_q, k, v).dk ** -0.5) if self.scale is None else self.scale
        new = {name: self._last(name, x, count) for name, x in group.inputs.items()}
        tensors = input_tensors(self.pattern, new)
        outs: list[Tensor] = []
        after: States = {}
        for branch in self.steps.stateful:
            prefix = _prefix(branch)
            begun = {name.removeprefix(prefix): x[entries] for name, x in state.items() if name.startswith(prefix)}
            executor = {"dense": self.how == "reference", "by_kernels": self.how == "gpu"}
            out, last = branch.attend(group_q, k, v, new, tensors, factor, begun, **executor)
            outs.append(out)
            after |= {f"{prefix}{name}": x for name, x in last.items()}
        unknown = state.keys() - after.keys()
        if unknown:
            raise ArgumentError(f"state has {', '.join(map(str, unknown))}: expected {', '.join(after)}")
        return self._attentions(group_q, group, factor, self.steps.by_branch(outs)), after

    def _attentions(self, q: Tensor, group: LengthGroup, factor: float, states: Mapping[str, Tensor]) -> Tensor:
        cache, length = group.cache, group.length
        k, v = cache.placeholders(length) if self.how == "cache" else cache.whole(range(len(group.entries)), length)
        inputs = {name: self._whole(name, x, length) for name, x in group.inputs.items()}
        real = dict(zip((t.name for t in self.pattern.tensors), input_tensors(self.pattern, inputs), strict=True))
        call = CallInputs(check_tensors(q, k, v), inputs, real, factor, states)
        if self.how == "cache":
            return self.steps.on_cache(q, k, v, cache, call)[0]
        run = {"cpu": self.steps.on_cpu, "gpu": self.steps.on_gpu, "reference": self.steps.densely}[self.how]
        return run(q, k, v, call)[0]

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


__all__ = ["How", "States", "beginning", "served"]
