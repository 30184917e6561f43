"""Patterns that have branches with a state, served: keys and values from a cache, the states handed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from attnc.compiler.attentions import inputs_of_attentions
from attnc.compiler.ir import Pattern
from attnc.runtime.caches import Cache
from attnc.runtime.call_errors import ArgumentError, ArgumentTypeError
from attnc.runtime.call_inputs import CallInputs
from attnc.runtime.general_attention import steps_of
from attnc.runtime.pattern_executor import PatternExecutor
from attnc.runtime.plans import Planner
from attnc.runtime.serving import LengthGroup, length_groups, together
from attnc.runtime.tensor_checks import check_tensors, input_tensors

if TYPE_CHECKING:
    from attnc.runtime.recurrent.pattern_recurrence import PatternRecurrence

States = dict[str, Tensor]
How = Literal["cache", "cpu", "gpu", "reference"]
"""By which executor; "cache": attentions read the cache where it lies, without a gradient."""

BY_TOKEN = frozenset({"token", "key"})


def beginning(steps: PatternExecutor, sizes: Mapping[str, int], batch: int, heads: int, like: Tensor) -> States:
    """The states of all branches before the first token, `branch.state` (a family's: `branch[0].state`)."""
    found: States = {}
    for one in steps.stateful:
        own = one.beginning(sizes, batch, heads, like)
        found |= {f"{_prefix(one)}{name}": x for name, x in own.items()}
    return found


def served(
    rows: Planner,
    how: How,
    q: Tensor,
    cache: Cache,
    scale: float | None,
    inputs: Mapping[str, object],
    state: object,
) -> tuple[Tensor, States]:
    """(out of the last queries, the states after them); `rows` are the last rows of a pattern.

    The last tokens of the cache are those that the states have not seen. Inputs that only branches with a state read
    may have entries for these alone.

    Raises what calls raise.
    """
    if not isinstance(state, Mapping):
        raise ArgumentTypeError(
            f"`{rows.pattern.name}` has branches with a state: give `state`, at first attend.init_state(batch, heads, "
            f"dk, dv); what comes back is (out, state)"
        )
    serving = _Serving(steps_of(rows), rows.pattern, how, scale, inputs_of_attentions(rows.pattern))
    shares = list(length_groups(rows.pattern, cache, inputs))
    found, after = [], []
    for share in shares:
        own, last = serving.share(q, share, state)
        found.append((own, None))
        after.append(last)
    out, _ = together(q, found, shares)
    order = torch.tensor([entry for share in shares for entry in share.entries], dtype=torch.int64).argsort()
    return out, {name: torch.cat([last[name] for last in after])[order.to(x.device)] for name, x in after[0].items()}


@dataclass(frozen=True)
class _Serving:
    steps: PatternExecutor
    pattern: Pattern
    how: How
    scale: float | None
    of_attentions: frozenset[str]
    """Inputs that others than branches with a state read."""

    def share(self, q: Tensor, share: LengthGroup, state: Mapping[str, Tensor]) -> tuple[Tensor, States]:
        """Batch entries of one length."""
        entries, count, length = list(share.entries), q.shape[2], share.length
        own, cache = q[entries], share.cache
        k, v = cache.gathered(range(len(entries)), np.arange(length - count, length))
        factor = float(check_tensors(own, k, v).dk ** -0.5) if self.scale is None else self.scale
        new = {name: self._last(name, x, count) for name, x in share.inputs.items()}
        tensors = input_tensors(self.pattern, new)
        outs: list[Tensor] = []
        after: States = {}
        for one in self.steps.stateful:
            prefix = _prefix(one)
            begun = {name.removeprefix(prefix): x[entries] for name, x in state.items() if name.startswith(prefix)}
            how = {"dense": self.how == "reference", "by_kernels": self.how == "gpu"}
            out, last = one.attend(own, k, v, new, tensors, factor, begun, **how)
            outs.append(out)
            after |= {f"{prefix}{name}": x for name, x in last.items()}
        unknown = state.keys() - after.keys()
        if unknown:
            raise ArgumentError(f"state has {', '.join(map(str, unknown))}: there are {', '.join(after)}")
        return self._attentions(own, share, factor, self.steps.by_branch(outs)), after

    def _attentions(self, q: Tensor, share: LengthGroup, factor: float, states: Mapping[str, Tensor]) -> Tensor:
        cache, length = share.cache, share.length
        k, v = cache.placeholders(length) if self.how == "cache" else cache.whole(range(len(share.entries)), length)
        inputs = {name: self._whole(name, x, length) for name, x in share.inputs.items()}
        real = dict(zip((t.name for t in self.pattern.tensors), input_tensors(self.pattern, inputs), strict=True))
        given = CallInputs(check_tensors(q, k, v), inputs, real, factor, states)
        if self.how == "cache":
            return self.steps.on_cache(q, k, v, cache, given)[0]
        run = {"cpu": self.steps.on_cpu, "gpu": self.steps.on_gpu, "reference": self.steps.densely}[self.how]
        return run(q, k, v, given)[0]

    def _axes(self, name: str) -> list[int]:
        """Where an input has an entry for each token."""
        tensor = next((tensor for tensor in self.pattern.tensors if tensor.name == name), None)
        return [] if tensor is None else [axis for axis, dim in enumerate(tensor.dims) if dim in BY_TOKEN]

    def _last(self, name: str, x: Any, count: int) -> Any:
        """An input of the last tokens."""
        for axis in self._axes(name):
            at: list[Any] = [slice(None)] * len(x.shape)
            at[axis] = slice(max(x.shape[axis] - count, 0), None)
            x = x[tuple(at)]
        return x

    def _whole(self, name: str, x: Any, length: int) -> Any:
        """An input as attentions are given it; what they do not read may be of the last tokens alone."""
        axes = self._axes(name)
        if not axes or name in self.of_attentions:
            return x
        shape = [length if axis in axes else size for axis, size in enumerate(x.shape)]
        return torch.as_tensor(x).new_zeros(()).expand(shape)


def _prefix(one: PatternRecurrence) -> str:
    member = "" if one.recur.member is None else f"[{one.recur.member}]"
    return f"{one.recur.name}{member}."


__all__ = ["How", "States", "beginning", "served"]
