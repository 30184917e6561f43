"""`attnc::decode` and `attnc::prefill`: attention over a cache as operators of torch, for traced calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from attnc.compiler.passes.last_rows import OtherRowsError
from attnc.runtime.call.caches import check_cache
from attnc.runtime.call.call_errors import UnsupportedError
from attnc.runtime.call.length_groups import LengthGroup, Result, by_length
from attnc.runtime.call.sharded import refuse_shards
from attnc.runtime.call.tensor_checks import input_tensors
from attnc.runtime.executors.cpu.flash_kernel import lse_dtype
from attnc.runtime.executors.pattern_parts import parts_of
from attnc.runtime.executors.registry import executor_named
from attnc.runtime.operators import FAKE
from attnc.runtime.operators.attend import Inputs
from attnc.runtime.operators.attend_general import contiguous
from attnc.runtime.planning.cache_arguments import CacheArguments, check_queries, not_served
from attnc.runtime.planning.planners import planner_of
from attnc.runtime.planning.plans import Planner
from attnc.runtime.process.profiling import profiled
from attnc.runtime.texts import identity

Pair = tuple[Tensor, Tensor]

Arguments: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Inputs, str, float | None, bool]"
"""q, k_cache, v_cache, kv_len, block_table, the inputs, the pattern's text, the scale, whether the cache is a ring."""

_DECODE = torch.ops.attnc.decode.default
_PREFILL = torch.ops.attnc.prefill.default


class CachedStep(NamedTuple):
    """The text of a pattern's last rows, the scale, whether the cache is a ring, and whether the result has an LSE."""

    pattern: str
    scale: float | None
    ring: bool
    has_lse: bool


def decode(
    step: CachedStep, q: Tensor, k: Tensor, v: Tensor, kv_len: object, block_table: object, tensors: Sequence[Tensor]
) -> Result:
    """Return (out, lse) as one node of a graph. Lengths given as numbers are constants in it, a tensor is data."""
    return _node(_DECODE, step, q, k, v, kv_len, block_table, tensors)


def prefill(
    step: CachedStep, q: Tensor, k: Tensor, v: Tensor, kv_len: object, block_table: object, tensors: Sequence[Tensor]
) -> Result:
    """Compute (out, lse) of a chunk of any number of queries; not differentiable."""
    return _node(_PREFILL, step, q, k, v, kv_len, block_table, tensors)


def _node(
    operator: Callable[..., Pair],
    step: CachedStep,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: object,
    block_table: object,
    tensors: Sequence[Tensor],
) -> Result:
    if isinstance(kv_len, Tensor):
        lengths = kv_len.expand(q.shape[0]) if kv_len.dim() == 0 else kv_len
    elif isinstance(kv_len, (list, tuple)):
        lengths = torch.tensor(kv_len)
    else:
        lengths = torch.full((q.shape[0],), kv_len, dtype=torch.int64)  # type: ignore[call-overload]
    table = block_table if block_table is None or isinstance(block_table, Tensor) else torch.as_tensor(block_table)
    out, lse = operator(q, k, v, lengths, table, tensors or None, step.pattern, step.scale, step.ring)
    return out, lse if step.has_lse else None


def _rows(pattern: str) -> Planner:
    """Return the planner of the last rows. Raises UnsupportedError where a row needs more than a cache holds."""
    try:
        return planner_of(pattern)
    except OtherRowsError as error:
        bound, _, _ = identity.read(pattern)
        raise not_served(bound.program.name, error) from error


def _described(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: Tensor,
    block_table: Tensor | None,
    inputs: Inputs,
    pattern: str,
    scale: float | None,
    ring: bool,
) -> tuple[Planner, CacheArguments]:
    """Return the planner of the last rows and the call that an operator's arguments describe."""
    refuse_shards()
    rows = _rows(pattern)
    named = {tensor.name: x for tensor, x in zip(rows.pattern.tensors, inputs or (), strict=True)}
    return rows, CacheArguments(q, k, v, kv_len, block_table, ring, scale, named)


def _forward(*arguments: Unpack[Arguments]) -> Pair:
    rows, call = _described(*arguments)
    with torch.no_grad(), profiled(rows.pattern.name, "decode"):
        out, lse, _ = executor_named("triton" if call.q.is_cuda else "cpu").decode(rows, call)
    return _written(rows.pattern.name, call.q, out, lse)


def _forward_of_chunk(*arguments: Unpack[Arguments]) -> Pair:
    rows, call = _described(*arguments)

    def run(q: Tensor, group: LengthGroup) -> Result:
        k, v = group.cache.whole(range(len(group.entries)), group.length)
        tensors = input_tensors(rows.pattern, group.inputs)
        operator = torch.ops.attnc.attend if parts_of(rows).is_plain else torch.ops.attnc.attend_general
        out, lse = operator.default(q, k, v, tensors or None, rows.text, call.scale)
        return out, lse if parts_of(rows).has_lse else None

    with torch.no_grad(), profiled(rows.pattern.name, "prefill"):
        out, lse = by_length(rows.pattern, call.q, call.cache(rows.pattern), call.inputs, run)
    return _written(rows.pattern.name, call.q, out, lse)


def _written(name: str, q: Tensor, out: Tensor, lse: Tensor | None) -> Pair:
    """Return out and LSE as the operator promises: contiguous, the LSE empty where there is none."""
    no_lse = q.new_empty((0,), dtype=lse_dtype(q.dtype))
    return contiguous(name, "out", out), no_lse if lse is None else contiguous(name, "lse", lse)


def _fake(*arguments: Unpack[Arguments]) -> Pair:
    q, k, v, _, block_table, _, pattern, _, _ = arguments
    check_cache(q, k, v, paged=block_table is not None)
    shape = q.shape[:3] if parts_of(_rows(pattern)).has_lse else (0,)
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(shape, dtype=lse_dtype(q.dtype))


def _unrecorded(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Pair:
    check_queries(q, k, v)
    with torch._C._AutoDispatchBelowAutograd():
        return cast("Pair", _DECODE(q, k, v, *rest))


def _unrecorded_chunk(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Pair:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise UnsupportedError("attnc::prefill has no gradient: call `prefill` outside of the graph, or under no_grad")
    with torch._C._AutoDispatchBelowAutograd():
        return cast("Pair", _PREFILL(q, k, v, *rest))


KERNELS = {
    ("decode", "CPU"): _forward,
    ("decode", "CUDA"): _forward,
    ("decode", "Autograd"): _unrecorded,
    ("decode", FAKE): _fake,
    ("prefill", "CPU"): _forward_of_chunk,
    ("prefill", "CUDA"): _forward_of_chunk,
    ("prefill", "Autograd"): _unrecorded_chunk,
    ("prefill", FAKE): _fake,
}
"""The kernels that `attnc.runtime.operators` calls."""
