"""The triton executor: each part of a pattern by Triton kernels, on a CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler.analysis.pooled import pooled_keys
from attnc.compiler.ir import Pattern
from attnc.compiler.ir.value_nodes import is_plain
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.planning.cpu_plan import Memory, Plan
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.device_targets import named_target, target_of
from attnc.runtime.call.given_devices import check_devices
from attnc.runtime.call.tensor_checks import (
    TensorSizes,
    as_tensor,
    blank_choices,
    call_shape,
    check_tensors,
    input_tensors,
)
from attnc.runtime.call.transforms import wide_in_interpreter
from attnc.runtime.executors.cpu.autograd import differentiable
from attnc.runtime.executors.cpu.cpu_entry import pooled_tensors, real_of
from attnc.runtime.executors.executor_protocol import CallSite, Executor, Pair, Results, SourceRequest, States
from attnc.runtime.executors.pattern_parts import (
    NOT_TRANSFORMED,
    is_plain_pattern,
    parts_of,
    plan_parts,
    recomputed_gradients,
    run_parts,
)
from attnc.runtime.executors.selections.placed import attend as attend_placed
from attnc.runtime.executors.triton import gpu_decoding, scored_on_gpu
from attnc.runtime.executors.triton.device_cache import read_device_cache
from attnc.runtime.executors.triton.gpu_plan import how_listed, plan_on_gpu
from attnc.runtime.executors.triton.gpu_work import OnGpu
from attnc.runtime.executors.triton.kernel_texts import sources
from attnc.runtime.executors.triton.recurrent.recurrence_texts import recurrent_sources
from attnc.runtime.fallbacks import (
    CAST,
    COPY,
    DENSE,
    FACTORS,
    HOST_LISTS,
    HOST_WAIT,
    IN_TORCH,
    LISTED_PLACES,
    MOVED,
    PASSES,
    RECURRENT_IN_TORCH,
    SEQUENCES,
    TOKENS,
    Kind,
)
from attnc.runtime.planning.cache_arguments import CacheArguments
from attnc.runtime.planning.gather_choices import choice_of
from attnc.runtime.planning.plans import Planner, relations_of

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence

TRACED = (
    'backend="triton" on the CPU in torch.compile: torch cannot trace Triton\'s interpreter; use the default backend, '
    "or leave fullgraph=True out"
)


class TritonExecutor:
    """Triton kernels, forward and backward."""

    name = "triton"
    fallbacks: tuple[Kind, ...] = (
        IN_TORCH,
        DENSE,
        LISTED_PLACES,
        HOST_LISTS,
        PASSES,
        SEQUENCES,
        TOKENS,
        FACTORS,
        RECURRENT_IN_TORCH,
        HOST_WAIT,
        MOVED,
        COPY,
        CAST,
    )
    lists_tiles = True
    splits_sums = True

    # --- calls -------------------------------------------------------------------------------------------------------

    def supports(self, pattern: Pattern, call: CallSite) -> str | None:
        """Return None for tensors on a GPU, and for those on a CPU where Triton interprets its kernels."""
        if call.transformed and not is_plain_pattern(pattern):
            return NOT_TRANSFORMED
        if call.device.type == "cuda":
            return None
        if call.traced:
            return TRACED
        try:
            target_of(call.device)
        except UnsupportedError as error:
            return str(error)
        return None

    def forward(self, planner: Planner, call: CallArguments) -> Results:
        """Compute a call, each part by its kernels; in fp32 where the interpreter cannot multiply the dtype."""
        q, k, v = self.operands(planner.pattern, call.q, call.k, call.v)
        if q is call.q:
            return run_parts(planner, call, self)
        out, lse, states = run_parts(planner, replace(call, q=q, k=k, v=v, known_sizes=None), self)
        return Results(out.to(call.q.dtype), lse, states)

    def backward(
        self, planner: Planner, call: CallArguments, results: Pair | None, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Return the gradients of a plain call from its results, of other calls by a second forward."""
        grad_out, grad_lse = gradients
        if results is None or grad_out is None:
            return recomputed_gradients(planner, call, self, gradients)
        kept = (call.q, call.k, call.v, *results, *call.tensors_of(planner.pattern))
        return OnGpu(planner, call.scale).backward(grad_out, grad_lse, kept)

    def decode(self, rows: Planner, call: CacheArguments) -> Results:
        """Compute the last queries by kernels that read the cache in splits of the keys."""
        pattern = rows.pattern
        if pattern.stateful:
            raise UnsupportedError(
                f"decode of `{pattern.name}` by kernels is not supported for several branches; call `prefill`"
            )
        q, k, v = self.operands(pattern, call.q, call.k, call.v)
        cache = read_device_cache(q, k, v, call.kv_len, call.block_table, ring=0 if call.ring else None)
        if call.ring:
            longest = None if cache.known_lengths is None else max(cache.known_lengths, default=0)
            cache = replace(cache, ring=call.first_ring_token(pattern, longest))
        check_tensors(q, *cache.placeholders(q.shape[2]))
        tensors = input_tensors(pattern, call.inputs)
        check_devices(pattern, call.inputs, tensors, q)
        real = {t.name: x for t, x in zip(pattern.tensors, tensors, strict=True)}
        factor = float(q.shape[3] ** -0.5) if call.scale is None else call.scale
        try:
            if pattern.selections:
                raise NotInKernelsError("decoding with selections")
            if len(pattern.nodes) > 1 or pattern.combine is not None or pattern.nodes[0].family is not None:
                raise NotInKernelsError("decoding with several attentions")
            out, lse = gpu_decoding.decode(rows, q, cache, factor, real, call.inputs)
        except NotInKernelsError as error:
            raise UnsupportedError(
                f"decode of `{pattern.name}` by kernels is not supported for {error}; call `prefill`, which has "
                f"kernels for more, or decode on the CPU"
            ) from error
        return Results(out.to(call.q.dtype), lse)

    # --- before a call -----------------------------------------------------------------------------------------------

    def plan(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of a call on the GPU of this machine, or on sm_90 where there is none."""
        return plan_parts(planner, sizes, inputs, self)

    def source(self, planner: Planner, request: SourceRequest) -> dict[str, str]:
        """Return the Triton text of every kernel that a call starts, alone and with its gradient, and of decoding."""
        parts, sizes = parts_of(planner), request.sizes
        texts: dict[str, str] = {}
        for recurrent in parts.recurrences:
            texts |= recurrent_sources(
                request.bound, recurrent, request.target, sizes.dk, request.dtype, request.inputs
            )
        if parts.recurrence is not None:
            return texts
        planners = [(planner.pattern.name, planner)]
        if parts.attentions is not None:
            planners = parts.attentions.planners(sizes, request.inputs, splits_sums=True)
        try:
            return texts | sources(planners, request.target, sizes.dk, request.dtype)
        except UnsupportedError:
            if not texts:
                raise
            return texts  # only the branches with a state have kernels

    def memory(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Memory | None:
        """Return the memory of a call of one softmax over plain scores; None for any other call."""
        return self.plan(planner, sizes, inputs).memory

    # --- parts -------------------------------------------------------------------------------------------------------

    def operands(self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, in fp32 where Triton's interpreter cannot multiply them."""
        return wide_in_interpreter(pattern.name, q, k, v)

    def attention(self, planner: Planner, call: CallArguments, known: Mapping[str, Tensor]) -> Pair:
        """Run one attention by the kernels made for it."""
        pattern, (q, k, v) = planner.pattern, (call.q, call.k, call.v)
        pooled = pooled_keys(pattern.attend) if q.numel() and k.numel() and choice_of(pattern.attend) else None
        if pooled is not None:
            keys = pooled_tensors(planner, call, known, pooled)
            placed = attend_placed(planner, keys.in_call(call), by_kernels=True)
            placed = None if placed is None else keys.of_scores(placed)
        else:
            placed = attend_placed(planner, call, by_kernels=True)
        if placed is not None:
            return placed
        inputs = [known[t.name] if t.is_floating else as_tensor(call.inputs[t.name]) for t in pattern.tensors]
        if is_plain(pattern.attend):
            return differentiable(q, k, v, OnGpu(planner, call.scale), inputs)
        relations = relations_of(pattern, call_shape(pattern, call.sizes, blank_choices(pattern, call.inputs)))
        return scored_on_gpu.attend(q, k, v, relations, call.scale, planner, real_of(pattern, known), inputs)

    def attention_plan(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of one attention."""
        return plan_on_gpu(planner, sizes, inputs, named_target(None))

    def listing(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> str:
        """Return whether kernels or the host list the tiles of selected keys."""
        return how_listed(planner, sizes, inputs, named_target(None))

    def recurrence(self, recurrence: PatternRecurrence, call: CallArguments) -> tuple[Tensor, States]:
        """Run a recurrence by kernels, chunk by chunk or token by token."""
        tensors = call.tensors_of(recurrence.pattern)
        return recurrence.attend(call.q, call.k, call.v, call.inputs, tensors, call.scale, call.state, by_kernels=True)

    def recurrence_plan(self, recurrence: PatternRecurrence, dtype: torch.dtype) -> str:
        """Return whether the recurrence runs by kernels."""
        return recurrence.how_by_kernels(dtype)


EXECUTOR: Executor = TritonExecutor()
"""The executor that `registry` names."""
