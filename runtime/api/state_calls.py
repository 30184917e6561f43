"""The states of a compiled pattern, which the caller passes on from call to call."""

from __future__ import annotations

import textwrap

import torch

from attnc.runtime.api.compiled import CompiledAttention
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.call.tensor_checks import check_counts
from attnc.runtime.executors.executor_protocol import States
from attnc.runtime.executors.stateful_cache import states_before


def derivation(compiled: CompiledAttention) -> str:
    """Return the derivation from a recurrence's steps, as `Attention.derivation` does."""
    if compiled.parts.recurrence is not None:
        return compiled.parts.recurrence.derivation
    if not compiled.parts.recurrences:
        raise compiled.has_no_state()
    lines = []
    for branch in compiled.parts.recurrences:
        member = "" if branch.recur.member is None else f"[{branch.recur.member}]"
        lines += [f"branch {branch.recur.name}{member}", textwrap.indent(branch.derivation, "    ")]
    return "\n".join(lines)


def first_states(
    compiled: CompiledAttention,
    batch: int,
    heads: int,
    sizes: dict[str, int],
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> States:
    """Return the states before the first token, as `Attention.init_state` does; `sizes`: dk, dv and those it names."""
    pattern, parts = compiled.pattern, compiled.parts
    recurrences = [recur for recur in (pattern.recur, *pattern.stateful) if recur is not None]
    if not recurrences:
        raise compiled.has_no_state()
    check_counts(0, batch=batch)
    check_counts(1, heads=heads, dk=sizes["dk"], dv=sizes["dv"])
    for state in (state for recurrence in recurrences for state in recurrence.states):
        for dim in state.dims:
            if isinstance(dim, str) and dim not in sizes:
                raise ArgumentError(f"the state `{state.name}` has a dimension `{dim}`: pass its size, {dim}=…")
    like = torch.empty((), dtype=dtype, device=device)
    if parts.recurrence is not None:
        return parts.recurrence.beginning(sizes, batch, heads, like)
    assert parts.attentions is not None
    return states_before(parts.attentions, sizes, batch, heads, like)
