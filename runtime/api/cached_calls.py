"""Decoding and prefill of a compiled pattern: attention of queries over a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from attnc.runtime.call.call_errors import ArgumentTypeError, UnsupportedError
from attnc.runtime.call.length_groups import LengthGroup, Result, by_length
from attnc.runtime.call.sharded import refuse_shards
from attnc.runtime.call.tensor_checks import finite, input_tensors
from attnc.runtime.call.transforms import cast_for_autocast, without_autocast
from attnc.runtime.executors.executor_protocol import Results, States
from attnc.runtime.executors.stateful_cache import run_with_states
from attnc.runtime.operators import cached
from attnc.runtime.planning.cache_arguments import CacheArguments, check_queries
from attnc.runtime.process.profiling import is_profiling, profiled

if TYPE_CHECKING:
    from attnc.runtime.api.compiled import CompiledAttention

Lengths: TypeAlias = "int | Sequence[int] | Tensor"


@dataclass(frozen=True, slots=True)
class CachedCall:
    """A call of a pattern's last rows against a cache; `decode` and `prefill` of an `Attention` are two of them."""

    compiled: CompiledAttention
    what: Literal["decode", "prefill"]

    @overload
    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        kv_len: Lengths,
        block_table: object = None,
        ring: bool = False,
        scale: float | None = None,
        return_lse: Literal[False] = False,
        state: None = None,
        **inputs: object,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        kv_len: Lengths,
        block_table: object = None,
        ring: bool = False,
        scale: float | None = None,
        return_lse: Literal[True],
        state: None = None,
        **inputs: object,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        kv_len: Lengths,
        block_table: object = None,
        ring: bool = False,
        scale: float | None = None,
        return_lse: Literal[False] = False,
        state: States,
        **inputs: object,
    ) -> tuple[Tensor, States]: ...

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        kv_len: Lengths,
        block_table: object = None,
        ring: bool = False,
        scale: float | None = None,
        return_lse: bool = False,
        state: States | None = None,
        **inputs: object,
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, States]:
        """Compute attention of the last tokens of each batch entry over a cache: out (B, Hq, Nq, dv).

        The result equals the last rows of a call with all tokens.

        q (B, Hq, Nq, dk). `kv_len`: the number of tokens of each entry so far, including those of q, whose keys and
        values must be in the cache already: a number, or one per entry. k_cache (B, Hkv, S, dk) and v_cache (B, Hkv, S,
        dv) hold token t in slot t. With `block_table`, int (B, columns), they are (pages, Hkv, page, d), and token t of
        entry b is in slot `t % page` of page `block_table[b, t // page]`. With `ring` the oldest slots are overwritten:
        a cache of `need.first + need.last + Nq - 1` slots is enough, where `need` is the plan's `Plan.cache`; token t
        is in slot t before `need.first`, and in `need.first + (t - need.first) % (S - need.first)` from there on.
        Inputs by token have an entry for each slot, or, with a block table, for each token.

        `state`: for a pattern with branches that have a state, their state before these tokens, at first `init_state`;
        the result is then (out, state). Inputs by token that only these branches read may have entries for the tokens
        of q alone.

        Raises ArgumentError, ArgumentTypeError, UnsupportedError, EvaluationError.
        """
        compiled = self.compiled
        self._check_state(state, return_lse)
        if self.what == "decode" and not (
            inputs or block_table is not None or not compiled.takes_shortcuts or is_dynamo_compiling() or is_profiling()
        ):
            step = compiled.direct_decoding
            pair = step and step.attend(q, k_cache, v_cache, kv_len, scale, ring=ring, with_lse=return_lse)
            if pair:
                return compiled.lse_of(Results(*pair), True) if return_lse else pair[0]
        factor = None if scale is None else finite(scale)
        call = CacheArguments(q, k_cache, v_cache, kv_len, block_table, ring, factor, inputs, state).checked()
        call = call.on(*cast_for_autocast(compiled.name, q, k_cache, v_cache))
        results = self._decoded(call) if self.what == "decode" else self._prefilled(call)
        if results.states is not None:
            return results.out, results.states
        return compiled.lse_of(results, return_lse)

    def _check_state(self, state: object, return_lse: bool) -> None:
        compiled = self.compiled
        if not torch.compiler.is_compiling():
            refuse_shards()
        compiled._refuse_recurrence("cache: a recurrence passes its state on by `step`, or by `state`")
        if state is not None and not compiled.pattern.stateful:
            raise ArgumentTypeError(f"state: `{compiled.name}` has no branch with a state")
        if return_lse and compiled.pattern.stateful:
            raise UnsupportedError(
                f"return_lse: the combined output of `{compiled.name}` is not a softmax and has no LSE"
            )

    def _decoded(self, call: CacheArguments) -> Results:
        """Compute the last 1 to 16 tokens, reading only the slots of keys that are visible to them."""
        compiled = self.compiled
        check_queries(call.q, call.k, call.v)
        if torch.compiler.is_compiling() and not compiled.pattern.stateful:
            compiled.refuse_in_graphs(call.q)
            return self._node(call)
        executor = compiled.executor_of(call.q)
        with without_autocast(call.q), profiled(compiled.name, "decode"):
            return executor.decode(compiled.last_rows.planner, call)

    def _prefilled(self, call: CacheArguments) -> Results:
        """Compute a chunk of any number of tokens as a call computes it; any slot up to `kv_len` may be read."""
        compiled = self.compiled
        if torch.compiler.is_compiling() and self._is_node(call):
            return self._node(call)
        rows, executor = compiled.last_rows, compiled.executor_of(call.q)
        if compiled.pattern.stateful:
            with without_autocast(call.q):
                return run_with_states(rows.planner, call, executor)

        def run(q: Tensor, group: LengthGroup) -> Result:
            k, v = group.cache.whole(range(len(group.entries)), group.length)
            return rows.run(q, k, v, call.scale, group.inputs)[:2]

        with profiled(compiled.name, "prefill"):
            return Results(*by_length(rows.pattern, call.q, call.cache(rows.pattern), call.inputs, run))

    def _node(self, call: CacheArguments) -> Results:
        """Run a call as one node of a graph."""
        compiled = self.compiled
        step = cached.CachedStep(compiled.rows_text, call.scale, call.ring, compiled.has_lse)
        node = cached.decode if self.what == "decode" else cached.prefill
        tensors = input_tensors(compiled.pattern, call.inputs)
        return Results(*node(step, call.q, call.k, call.v, call.kv_len, call.block_table, tensors))

    def _is_node(self, call: CacheArguments) -> bool:
        """Check whether a chunk runs as one graph node: without gradients, which the operator does not support."""
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
        return not recorded and self.compiled.has_operators(call.q)
