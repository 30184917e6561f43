"""The cpu executor: each part of a pattern by the CPU path that fits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from attnc.compiler.analysis.pooled import PooledKeys, pooled_keys
from attnc.compiler.ir import Pattern
from attnc.compiler.ir.value_nodes import is_plain, is_scored
from attnc.compiler.planning.cpu_plan import Memory, Plan
from attnc.runtime.call.arguments import CallArguments, read_call
from attnc.runtime.call.caches import Cache
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.length_groups import LengthGroup, Result, by_length
from attnc.runtime.call.tensor_checks import TensorSizes, call_shape
from attnc.runtime.call.transforms import is_observed, needs_record
from attnc.runtime.executors.cpu import cpu_decoding, row_attention, scored_attention
from attnc.runtime.executors.cpu.autograd import Planned, Triple, differentiable
from attnc.runtime.executors.cpu.autograd import attend as attend_plain
from attnc.runtime.executors.cpu.cpu_executor import Need
from attnc.runtime.executors.cpu.cpu_plans import cpu_plans
from attnc.runtime.executors.cpu.direct import direct_of
from attnc.runtime.executors.cpu.planned_call import PlannedCall, operands_of
from attnc.runtime.executors.cpu.pooled_attention import PooledTensors
from attnc.runtime.executors.cpu.pooled_attention import made as pooled_made
from attnc.runtime.executors.executor_protocol import CallSite, Executor, Pair, Results, SourceRequest, States
from attnc.runtime.executors.pattern_parts import (
    NOT_TRANSFORMED,
    attentions_of,
    is_plain_pattern,
    parts_of,
    plan_parts,
    recomputed_gradients,
    run_parts,
)
from attnc.runtime.executors.selections import listed
from attnc.runtime.executors.selections.few_tokens import attend as attend_few_tokens
from attnc.runtime.executors.selections.placed import attend as attend_placed
from attnc.runtime.executors.selections.selected_executor import attend as attend_tokens
from attnc.runtime.executors.stateful_cache import run_with_states
from attnc.runtime.fallbacks import CAST, COPY, DENSE, FACTORS, LISTED_PLACES, MOVED, PASSES, SEQUENCES, TOKENS, Kind
from attnc.runtime.planning.cache_arguments import CacheArguments
from attnc.runtime.planning.plans import Planner, relations_of
from attnc.runtime.process.profiling import profiled

if TYPE_CHECKING:
    from attnc.runtime.executors.recurrent.pattern_recurrence import PatternRecurrence


class CpuExecutor:
    """Tiles of a plan by torch's operations, forward and backward."""

    name = "cpu"
    fallbacks: tuple[Kind, ...] = (DENSE, LISTED_PLACES, PASSES, SEQUENCES, TOKENS, FACTORS, MOVED, COPY, CAST)
    lists_tiles = False
    splits_sums = False

    # --- calls -------------------------------------------------------------------------------------------------------

    def supports(self, pattern: Pattern, call: CallSite) -> str | None:
        """Return None for tensors on a CPU."""
        if call.transformed and not is_plain_pattern(pattern):
            return NOT_TRANSFORMED
        if call.device.type in ("cpu", "meta"):
            return None
        return (
            f'backend="cpu", but q is on {call.device}: the CPU executor takes tensors on the CPU; move them, or '
            f"leave `backend` out"
        )

    def forward(self, planner: Planner, call: CallArguments) -> Results:
        """Compute a call, each part by the path that fits it."""
        if parts_of(planner).is_plain:  # without the context of `run_parts`, which small calls notice
            return Results(*_plain(planner, call))
        return run_parts(planner, call, self)

    def backward(
        self, planner: Planner, call: CallArguments, results: Pair | None, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Return the gradients of a plain call from its results, of other calls by a second forward."""
        grad_out, grad_lse = gradients
        if results is None or grad_out is None:
            return recomputed_gradients(planner, call, self, gradients)
        plan = cpu_plans(planner).plan_of(call.q, call.k, call.v, call.tensors_of(planner.pattern))
        return Planned(plan, call.scale).backward(grad_out, grad_lse, (call.q, call.k, call.v, *results))

    def decode(self, rows: Planner, call: CacheArguments) -> Results:
        """Compute the last queries, reading only the keys that they see."""
        pattern, attentions = rows.pattern, attentions_of(rows)
        if call.q.numel() and any(x.device.type != "cpu" for x in (call.q, call.k, call.v)):
            raise UnsupportedError(f"decode on {call.q.device} is not supported; move the tensors to the CPU")
        if pattern.chooses and pattern.documents is not None:
            raise UnsupportedError(
                f"decode of `{pattern.name}` is not supported, because it selects within documents: call it without a "
                f"cache"
            )
        if pattern.stateful:
            return run_with_states(rows, call, self, _CacheReader)

        def run(q: Tensor, group: LengthGroup) -> Result:
            cache = group.cache
            whole = cache.whole(range(len(group.entries)), group.length) if attentions.needs_keys else None
            k, v = cache.placeholders(group.length) if whole is None else whole
            return attentions.run(read_call(pattern, q, k, v, call.scale, group.inputs), _CacheReader(cache))

        return Results(*by_length(pattern, call.q, call.cache(pattern), call.inputs, run))

    # --- before a call -----------------------------------------------------------------------------------------------

    def plan(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of a call, with costs at this machine's rates."""
        return plan_parts(planner, sizes, inputs, self)

    def source(self, planner: Planner, request: SourceRequest) -> dict[str, str]:
        """Raise UnsupportedError: the CPU executor emits no text."""
        raise UnsupportedError(f"`{planner.pattern.name}` runs on a CPU as operations of torch, which have no source")

    def memory(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Memory | None:
        """Return the memory of a call of one softmax over plain scores; None for any other call."""
        return self.plan(planner, sizes, inputs).memory

    # --- parts -------------------------------------------------------------------------------------------------------

    def operands(self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v as they are."""
        return q, k, v

    def attention(self, planner: Planner, call: CallArguments, known: Mapping[str, Tensor]) -> Pair:
        """Run one attention by the path made for it."""
        node = planner.pattern.attend
        plain, pooled = planner.part(_plain_and_pooled)
        if pooled is not None and call.q.numel() and call.k.numel():
            keys = pooled_tensors(planner, call, known, pooled)
            return keys.of_scores(_among_selected(planner, keys.in_call(call)))
        if plain:
            return _among_selected(planner, call)
        if planner.pattern.selections or node.keys is not None:
            plan = listed.plan_of(planner, call) or cpu_plans(planner).plan(call.sizes, call.inputs)
        else:
            tensors = [known[tensor.name] for tensor in planner.pattern.tensors]
            plan = cpu_plans(planner).plan_of(call.q, call.k, call.v, tensors)
        relations = relations_of(planner.pattern, call_shape(planner.pattern, call.sizes, call.inputs))
        planned, real = PlannedCall(plan, relations, call.scale), real_of(planner.pattern, known)
        attend = scored_attention.attend if is_scored(node) else row_attention.attend
        return attend(call.q, call.k, call.v, planned, real)

    def attention_plan(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> Plan:
        """Return the plan of one attention."""
        return cpu_plans(planner).plan(sizes, inputs)

    def listing(self, planner: Planner, sizes: TensorSizes, inputs: Mapping[str, object]) -> str:
        """Raise UnsupportedError: on a CPU, selected keys are gathered."""
        raise UnsupportedError(f"`{planner.pattern.name}` on a CPU lists no tiles")

    def recurrence(self, recurrence: PatternRecurrence, call: CallArguments) -> tuple[Tensor, States]:
        """Run a recurrence chunk by chunk, or token by token, by torch's operations."""
        tensors = call.tensors_of(recurrence.pattern)
        return recurrence.attend(call.q, call.k, call.v, call.inputs, tensors, call.scale, call.state)

    def recurrence_plan(self, recurrence: PatternRecurrence, dtype: torch.dtype) -> str:
        """Return whether the recurrence runs chunk by chunk or token by token."""
        return recurrence.how


class _CacheReader(CpuExecutor):
    """The executor of attentions against a cache, whose visible keys they read in place."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def attention(self, planner: Planner, call: CallArguments, known: Mapping[str, Tensor]) -> Pair:
        """Run one attention; `call.k` and `call.v` only give shapes."""
        decoding = cpu_decoding.look(planner, call.sizes, call.inputs)
        return cpu_decoding.attend(call.q, self._cache, decoding, call.scale, real_of(planner.pattern, known))


class _PlainCall(NamedTuple):
    """Plain attention by a plan; its backward is an operator of torch where something observes the call."""

    planned: Planned
    text: str
    scale: float | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Pair:
        return self.planned.forward(q, k, v, inputs)

    def backward(self, grad_out: Tensor, grad_lse: Tensor | None, kept: Sequence[Tensor]) -> Triple:
        if is_observed(kept[0], kept[1], kept[2]):  # the operator adds the profiler row
            with torch._C._AutoDispatchBelowAutograd():
                operator = torch.ops.attnc.attend_backward.default
                results = operator(grad_out, grad_lse, *kept[:5], kept[5:] or None, self.text, self.scale)
            return cast("Triple", results)
        with profiled(self.planned.plan.pattern, "backward"):
            return self.planned.backward(grad_out, grad_lse, kept)


def _plain_and_pooled(planner: Planner) -> tuple[bool, PooledKeys | None]:
    """Return whether an attention's scores are `scale * dot(q, k)`, and the pooled keys that make them so."""
    node = planner.pattern.attend
    return is_plain(node), pooled_keys(node)


def _plain(planner: Planner, call: CallArguments) -> Pair:
    """Compute softmax attention over tokens, in which nothing is selected."""
    q, k, v, plans = call.q, call.k, call.v, cpu_plans(planner)
    inputs = call.tensors_of(planner.pattern) if call.tensors else ()
    recorded = needs_record(q, k, v)
    need: Need = "lse" if call.wants_lse else "backward" if recorded else "out"
    planned = Planned(plans.plan_of(q, k, v, inputs), call.scale, need)
    if recorded:
        return differentiable(q, k, v, _PlainCall(planned, planner.text, call.passed_scale), inputs)
    pair = planned.forward(q, k, v, inputs)
    if need == "out" and not inputs:
        plans.direct = direct_of(q, k, v, planned.plan, call.passed_scale, call.scale, pair[0]) or plans.direct
    return pair


def _among_selected(planner: Planner, call: CallArguments) -> Pair:
    """Compute attention with scores `scale * dot(q, k)`, perhaps among selected keys."""
    pair = attend_few_tokens(planner, call) or attend_placed(planner, call) or attend_tokens(planner, call)
    if pair is not None:
        return pair
    plan = listed.plan_of(planner, call) or cpu_plans(planner).plan(call.sizes, call.inputs)
    if call.k.shape[1] != plan.kv_heads:  # heads of one kv head have different keys
        original, heads = plan, call.k.shape[1]
        _, plan = planner.remembered(
            ("heads", id(original), heads), lambda: (original, replace(original, kv_heads=heads))
        )
    return attend_plain(call.q, call.k, call.v, plan, call.scale)


def pooled_tensors(
    planner: Planner, call: CallArguments, known: Mapping[str, Tensor], pooled: PooledKeys
) -> PooledTensors:
    """Compute the keys and values of an attention whose keys are pooled."""
    relations = relations_of(planner.pattern, call_shape(planner.pattern, call.sizes, call.inputs))
    vectors = call.q.unbind(0), call.k.unbind(0), call.v.unbind(0)
    return pooled_made(operands_of(relations, call.scale, vectors, real_of(planner.pattern, known)), relations, pooled)


def real_of(pattern: Pattern, known: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the floating-point inputs of a pattern in its order."""
    return [known[tensor.name] for tensor in pattern.tensors if tensor.is_floating]


EXECUTOR: Executor = CpuExecutor()
"""The executor that `registry` names."""
