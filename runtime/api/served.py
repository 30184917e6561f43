"""Decoding and prefill of a compiled pattern: attention of queries over a cache of keys and values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from typing_extensions import Self

from attnc.compiler.passes.last_rows import OtherRowsError
from attnc.runtime.api.compiled import CompiledAttention
from attnc.runtime.call.caches import Cache, check_cache, read_cache
from attnc.runtime.call.call_errors import ArgumentError, ArgumentTypeError, UnsupportedError
from attnc.runtime.call.length_groups import Result
from attnc.runtime.call.sharded import refuse_shards
from attnc.runtime.call.tensor_checks import finite, input_tensors
from attnc.runtime.call.transforms import cast_for_autocast, wide_in_interpreter, without_autocast
from attnc.runtime.executors.cpu.direct_decoding import DirectDecoding, direct_decoding
from attnc.runtime.fallbacks import HOST_WAIT, note
from attnc.runtime.operators import cached
from attnc.runtime.process.profiling import is_profiling, profiled
from attnc.runtime.serving import serving, serving_states
from attnc.runtime.serving.serving_states import How, States

if TYPE_CHECKING:
    from attnc.runtime.executors.triton.device_cache import DeviceCache

NOT_TRACED = (
    "torch.compile does not trace decoding by the reference or in Triton's interpreter: use the default "
    "backend, or leave fullgraph=True out"
)

Lengths: TypeAlias = "int | Sequence[int] | Tensor"


def _check_ring(ring: object, block_table: object) -> None:
    if not isinstance(ring, bool):
        raise ArgumentTypeError(f"ring is {ring!r}: it must be True or False")
    if ring and block_table is not None:
        raise ArgumentError("ring and block_table are both given: use one or the other")


class Served(CompiledAttention):
    """Attention of the last rows of a sequence over a cache."""

    @overload
    def decode(
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
    def decode(
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
    def decode(
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

    def decode(
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
        """Compute attention of the last 1 to 16 tokens of each batch entry over a cache: out (B, Hq, Nq, dv).

        The result equals the last rows of a call with all tokens. Only slots of keys that are visible to these rows are
        read.

        q (B, Hq, Nq, dk). `kv_len`: the number of tokens of each entry so far, including those of q, whose keys and
        values must be in the cache already: a number, or one per entry. k_cache (B, Hkv, S, dk) and v_cache (B, Hkv, S,
        dv) hold token t in slot t. With `block_table`, int (B, columns), they are (pages, Hkv, page, d), and token t of
        entry b is in slot `t % page` of page `block_table[b, t

        page]`. With `ring` the oldest slots are overwritten: a cache of `need.first + need.last + Nq - 1` slots is
        enough, where `need` is the plan's `Plan.cache`; token t is in slot t before `need.first`, and in `need.first +
        (t - need.first) % (S - need.first)` from there on. Inputs by token have an entry for each slot, or, with a
        block table, for each token.

        `state`: for a pattern with branches that have a state, their state before these tokens, at first `init_state`;
        the result is then (out, state). Inputs by token that only these branches read may have entries for the tokens
        of q alone.

        Not differentiable. Raises ArgumentError, ArgumentTypeError, UnsupportedError, EvaluationError.
        """
        self._check_state(state, return_lse)
        if not (inputs or block_table is not None or self._skips_direct or is_dynamo_compiling() or is_profiling()):
            step = self._direct_decoding
            pair = step and step.attend(q, k_cache, v_cache, kv_len, scale, ring=ring, with_lse=return_lse)
            if pair:
                return self._lse_of(pair, return_lse)
        factor = None if scale is None else finite(scale)
        check_cache(q, k_cache, v_cache, paged=block_table is not None)
        q, k_cache, v_cache = cast_for_autocast(self.name, q, k_cache, v_cache)
        serving.check_queries(q, k_cache, v_cache)
        self._refuse_backend(q)
        if self._pattern.stateful:
            if self._is_by_kernels(q):
                raise UnsupportedError(
                    f"decode of `{self.name}` by kernels is not supported for several branches; call `prefill`"
                )
            executor: How = "reference" if self._is_reference else "cache"
            cache = self._cache(q, k_cache, v_cache, kv_len, block_table, ring)
            with without_autocast(q):
                return serving_states.served(self._last_rows._planner, executor, q, cache, factor, inputs, state)
        if torch.compiler.is_compiling():
            result = self._traced(q, k_cache, v_cache, kv_len, block_table, ring, factor, inputs)
        elif self._is_by_kernels(q):
            dtype = q.dtype
            q, k_cache, v_cache = wide_in_interpreter(self.name, q, k_cache, v_cache)
            device_cache = self._device_cache(q, k_cache, v_cache, kv_len, block_table, ring)
            with without_autocast(q), profiled(self.name, "decode"):
                out, lse = serving.decode_by_kernels(self._last_rows._planner, q, device_cache, factor, inputs)
            result = out.to(dtype), lse
        else:
            cache = self._cache(q, k_cache, v_cache, kv_len, block_table, ring)
            if self._is_reference:
                result = self._prefilled(q, cache, factor, inputs)
            else:
                with without_autocast(q), profiled(self.name, "decode"):
                    result = serving.decode(self._last_rows._planner, q, cache, factor, inputs)
        return self._lse_of(result, return_lse)

    @overload
    def prefill(
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
    def prefill(
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
    def prefill(
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

    def prefill(
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
        """Compute attention of a chunk of any number of tokens over a cache, as a call computes it; differentiable.

        Takes the arguments of `decode`. No slot past `kv_len` is read; any other slot may be, visible or not. Raises
        the errors of `decode`.
        """
        self._check_state(state, return_lse)
        check_cache(q, k_cache, v_cache, paged=block_table is not None)
        q, k_cache, v_cache = cast_for_autocast(self.name, q, k_cache, v_cache)
        dtype = q.dtype
        if self._pattern.stateful and self._is_by_kernels(q):
            q, k_cache, v_cache = wide_in_interpreter(self.name, q, k_cache, v_cache)
        if torch.compiler.is_compiling() and self._is_one_node(q, k_cache, v_cache):
            factor = None if scale is None else finite(scale)
            tensors = input_tensors(self._pattern, inputs)
            _check_ring(ring, block_table)
            step = cached.CachedStep(self._rows_text, factor, ring, self.has_lse)
            return self._lse_of(cached.prefill(step, q, k_cache, v_cache, kv_len, block_table, tensors), return_lse)
        cache = self._cache(q, k_cache, v_cache, kv_len, block_table, ring)
        self._refuse_backend(q)
        factor = None if scale is None else finite(scale)
        if self._pattern.stateful:
            executor: How = "reference" if self._is_reference else "gpu" if self._is_by_kernels(q) else "cpu"
            with without_autocast(q):
                out, states = serving_states.served(self._last_rows._planner, executor, q, cache, factor, inputs, state)
            return out.to(dtype), states
        with profiled(self.name, "prefill"):
            return self._lse_of(self._prefilled(q, cache, factor, inputs), return_lse)

    def _check_state(self, state: object, return_lse: bool) -> None:
        if not torch.compiler.is_compiling():
            refuse_shards()
        self._refuse_recurrence("cache: a recurrence passes its state on by `step`, or by `state`")
        if state is not None and not self._pattern.stateful:
            raise ArgumentTypeError(f"state: `{self.name}` has no branch with a state")
        if return_lse and self._pattern.stateful:
            raise UnsupportedError(f"return_lse: the combined output of `{self.name}` is not a softmax and has no LSE")

    def _prefilled(self, q: Tensor, cache: Cache, scale: float | None, inputs: Mapping[str, object]) -> Result:
        rows = self._last_rows

        def call(q: Tensor, k: Tensor, v: Tensor, scale: float | None, inputs: Mapping[str, object]) -> Result:
            result = rows._call(q, k, v, scale, rows.has_lse, inputs)
            return result if isinstance(result, tuple) else (result, None)

        return serving.prefill(rows._pattern, call, q, cache, scale, inputs)

    def _traced(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_len: Lengths,
        block_table: object,
        ring: bool,
        scale: float | None,
        inputs: Mapping[str, object],
    ) -> Result:
        """Run a decoding step as one node of a graph."""
        if self._is_reference or (self._options.backend == "triton" and not q.is_cuda):
            raise UnsupportedError(NOT_TRACED)
        _check_ring(ring, block_table)
        step = cached.CachedStep(self._rows_text, scale, ring, self.has_lse)
        return cached.decode(step, q, k, v, kv_len, block_table, input_tensors(self._pattern, inputs))

    def _is_one_node(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Check whether a chunk runs as one graph node: without gradients, which the operator does not support."""
        recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        interpreted = self._options.backend == "triton" and not q.is_cuda
        return not (recorded or interpreted or self._is_reference or self._pattern.stateful)

    def _is_by_kernels(self, q: object) -> bool:
        return not self._is_reference and (self._options.backend == "triton" or bool(getattr(q, "is_cuda", False)))

    def _cache(self, q: Tensor, k: Tensor, v: Tensor, kv_len: object, block_table: object, ring: bool) -> Cache:
        _check_ring(ring, block_table)
        for name, x in (("kv_len", kv_len), ("block_table", block_table)):
            if isinstance(x, Tensor) and x.is_cuda:
                note(self.name, HOST_WAIT, f"`{name}` is on the device, but the host needs it to plan")
        cache = read_cache(q, k, v, kv_len, block_table, ring=ring)
        first = serving.check_ring(self._pattern, q, k, max(cache.lengths, default=0)) if ring else None
        return replace(cache, ring=first)

    def _device_cache(
        self, q: Tensor, k: Tensor, v: Tensor, kv_len: object, block_table: object, ring: bool
    ) -> DeviceCache:
        from attnc.runtime.executors.triton.device_cache import read_device_cache  # only where kernels run

        _check_ring(ring, block_table)
        cache = read_device_cache(q, k, v, kv_len, block_table, ring=0 if ring else None)
        if not ring:
            return cache
        longest = None if cache.known_lengths is None else max(cache.known_lengths, default=0)
        return replace(cache, ring=serving.check_ring(self._pattern, q, k, longest))

    @cached_property
    def _last_rows(self) -> Self:
        """The pattern's form for its last rows. Raises UnsupportedError where a row needs data that no cache holds."""
        try:
            return self._in("last rows")
        except OtherRowsError as error:
            raise serving.not_served(self.name, error) from error

    @cached_property
    def _direct_decoding(self) -> DirectDecoding | None:
        """The decoding of steps of one query; None for patterns that no cache serves."""
        try:
            return direct_decoding(self._last_rows._planner)
        except UnsupportedError:
            return None

    @abstractmethod
    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, return_lse: bool, inputs: Mapping[str, object]
    ) -> Tensor | tuple[Tensor, Tensor]: ...
