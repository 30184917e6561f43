"""A compiled recurrence called token by token: its states are passed on by the caller."""

from __future__ import annotations

import textwrap
from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from attnc.runtime.api.compiled import CompiledAttention
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.call.tensor_checks import check_counts
from attnc.runtime.serving import serving_states

States: TypeAlias = "dict[str, Tensor]"
"""The states of a recurrence by name, (B, H, …) in fp32 (fp64 for calls in fp64)."""


class Stateful(CompiledAttention):
    """Methods that only patterns with states have."""

    def derivation(self) -> str:
        """Return the derivation from a recurrence's steps: the passes that run chunk by chunk, or why there are none.

        A pattern with stateful branches has one section per branch. Raises UnsupportedError for a pattern without
        states.
        """
        recurrent = self._general.recurrent
        if recurrent is not None:
            return recurrent.derivation
        branches = () if self._steps is None else self._steps.stateful
        if not branches:
            raise self._has_no_state()
        lines = []
        for branch in branches:
            member = "" if branch.recur.member is None else f"[{branch.recur.member}]"
            lines += [f"branch {branch.recur.name}{member}", textwrap.indent(branch.derivation, "    ")]
        return "\n".join(lines)

    def init_state(
        self,
        batch: int,
        heads: int,
        dk: int,
        dv: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **sizes: int,
    ) -> States:
        """Return the states before the first token: a tensor (batch, heads, …) for each, by name.

        A recurrence that reads token positions counts them in one more state, `t`, int64 (batch,). For a pattern that
        has branches with a state the names are `branch.state`, for `decode` and `prefill`.

        `sizes`: other sizes of states, named as in the inputs (`slots=64`).

        Raises UnsupportedError for a pattern, ArgumentError.
        """
        recur, recurrent, branches = self._pattern.recur, self._general.recurrent, self._pattern.stateful
        if recur is None and not branches:
            raise self._has_no_state()
        check_counts(0, batch=batch)
        check_counts(1, heads=heads, dk=dk, dv=dv)
        all_sizes = {"dk": dk, "dv": dv, **sizes}
        for state in (
            state for recurrence in (recur, *branches) if recurrence is not None for state in recurrence.states
        ):
            for dim in state.dims:
                if isinstance(dim, str) and dim not in all_sizes:
                    raise ArgumentError(f"the state `{state.name}` has a dimension `{dim}`: pass its size, {dim}=…")
        like = torch.empty((), dtype=dtype, device=device)
        if recurrent is not None:
            return recurrent.beginning(all_sizes, batch, heads, like)
        assert self._steps is not None
        return serving_states.beginning(self._steps, all_sizes, batch, heads, like)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: States, *, scale: float | None = None, **inputs: object
    ) -> tuple[Tensor, States]:
        """Return (out, state) of the next tokens: q (B, Hq, T, dk), k (B, Hkv, T, dk), v (B, Hkv, T, dv).

        The same as a call with `state` and `return_state=True`. Raises the errors of a call.
        """
        return self._with_state(q, k, v, scale, state, inputs)

    def _has_no_state(self) -> UnsupportedError:
        if self._pattern.stateful:
            return UnsupportedError(
                f"`{self.name}` has states in branches beside keys: `decode` and `prefill` pass them on, with `state`"
            )
        return UnsupportedError(f"`{self.name}` is a pattern, which has no state: only a `recurrence` has one")

    @abstractmethod
    def _with_state(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, state: object, inputs: Mapping[str, object]
    ) -> tuple[Tensor, States]: ...


__all__ = ["Stateful", "States"]
