"""Attention of queries over a cache of keys and values: a few at a time (decode), or a chunk of a prompt (prefill).

Batch entries of one length form one call of the pattern's last rows (`compiler.passes.last_rows`), so results equal
those of a call with all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.compiler.kernels.index_text import NotInKernelsError
from attnc.compiler.passes.attentions import inputs_of_attentions
from attnc.compiler.passes.last_rows import OtherRowsError
from attnc.runtime.call.caches import Cache
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.call.call_inputs import CallInputs
from attnc.runtime.call.given_devices import check_devices
from attnc.runtime.call.length_groups import (
    LengthGroup,
    Result,
    length_groups,
    together,
)
from attnc.runtime.call.tensor_checks import check_tensors, completed, input_tensors
from attnc.runtime.executors.general_attention import steps_of
from attnc.runtime.planning.plans import Planner, need_of

if TYPE_CHECKING:
    from attnc.runtime.executors.triton.device_cache import DeviceCache

MOST_QUERIES = 16
"""Maximum number of queries of `decode`."""

Call = Callable[[Tensor, Tensor, Tensor, "float | None", Mapping[str, object]], Result]
"""A function (q, k, v, scale, inputs) → (out, lse) of the last rows."""


def decode(rows: Planner, q: Tensor, cache: Cache, scale: float | None, inputs: Mapping[str, object]) -> Result:
    """Return (out, lse) of the last queries on the CPU; `rows`: the planner of the pattern's last rows.

    Raises ArgumentError, UnsupportedError.
    """
    steps = steps_of(rows)
    if not (q.shape[0] and q.shape[1]):
        return _empty_result(q, cache)
    if any(x.device.type != "cpu" for x in (q, cache.k, cache.v)):
        raise UnsupportedError(f"decode on {q.device} is not supported; move the tensors to the CPU")

    def attend_group(group: LengthGroup) -> Result:
        group_q = q[list(group.entries)]
        k, v = group.cache.placeholders(group.length)
        sizes = check_tensors(group_q, k, v)
        tensors = input_tensors(rows.pattern, group.inputs)
        check_devices(rows.pattern, group.inputs, tensors, group_q)
        real = {t.name: x for t, x in zip(rows.pattern.tensors, tensors, strict=True)}
        factor = float(sizes.dk**-0.5) if scale is None else scale
        inputs_ = completed(rows.pattern, group.inputs)
        return steps.on_cache(group_q, k, v, group.cache, CallInputs(sizes, inputs_, real, factor))

    groups = list(length_groups(rows.pattern, cache, inputs))
    return together(q, [attend_group(group) for group in groups], groups)


def decode_by_kernels(
    rows: Planner, q: Tensor, cache: DeviceCache, scale: float | None, inputs: Mapping[str, object]
) -> Result:
    """Return (out, lse) of the last queries by kernels. Raises ArgumentError, UnsupportedError."""
    from attnc.runtime.executors.triton.gpu_decoding import decode as by_kernels  # only where kernels run

    pattern = rows.pattern
    check_tensors(q, *cache.placeholders(q.shape[2]))
    tensors = input_tensors(pattern, inputs)
    check_devices(pattern, inputs, tensors, q)
    real = {t.name: x for t, x in zip(pattern.tensors, tensors, strict=True)}
    factor = float(q.shape[3] ** -0.5) if scale is None else scale
    try:
        if pattern.selections:
            raise NotInKernelsError("decoding with selections")
        if len(pattern.nodes) > 1 or pattern.combine is not None or pattern.nodes[0].family is not None:
            raise NotInKernelsError("decoding with several attentions")
        return by_kernels(rows, q, cache, factor, real, inputs)
    except NotInKernelsError as error:
        raise UnsupportedError(
            f"decode of `{pattern.name}` by kernels is not supported for {error}; call `prefill`, which has kernels "
            f"for more, or decode on the CPU"
        ) from error


def not_served(name: str, reason: OtherRowsError) -> UnsupportedError:
    """Return the error for a pattern whose rows need more than a cache holds."""
    return UnsupportedError(f"a cache of keys is not enough for `{name}`: a row needs {reason}; call it on all tokens")


def check_queries(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ArgumentError, UnsupportedError for queries that `decode` does not accept."""
    if not 1 <= q.shape[2] <= MOST_QUERIES:
        raise ArgumentError(
            f"q has {q.shape[2]} tokens (dimension 2): decode takes 1 to {MOST_QUERIES}; `prefill` takes any number"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise UnsupportedError("decode has no gradient: call it under torch.no_grad(), or call `prefill`")


def prefill(
    pattern: Pattern, call: Call, q: Tensor, cache: Cache, scale: float | None, inputs: Mapping[str, object]
) -> Result:
    """Return (out, lse) of any number of last queries, by a `call` of the pattern's last rows on all keys.

    Raises the errors of the call.
    """
    if not (q.shape[0] and q.shape[1]):
        return _empty_result(q, cache)
    groups = list(length_groups(pattern, cache, inputs))
    results = []
    for group in groups:
        k, v = group.cache.whole(range(len(group.entries)), group.length)
        group_q = q if len(groups) == 1 else q[list(group.entries)]
        results.append(call(group_q, k, v, scale, group.inputs))
    return together(q, results, groups)


def check_ring(pattern: Pattern, q: Tensor, k: Tensor, longest: int | None) -> int:
    """Return a ring's first overwritten token; `longest`: tokens, if known. Raises ArgumentError, UnsupportedError."""
    heads, n_q, slots = q.shape[1], q.shape[2], k.shape[2]
    names = inputs_of_attentions(pattern)
    read = [t.name for t in pattern.tensors if {"token", "key"} & set(t.dims) and t.name in names]
    if read:
        raise UnsupportedError(f"ring: `{pattern.name}` reads `{read[0]}` by token, whose old entries would be missing")
    need = need_of(pattern, heads, max(heads // max(k.shape[1], 1), 1))
    if need is None:
        raise ArgumentError(
            f"ring: `{pattern.name}` may need all tokens; use a cache with a slot for each, or a block_table"
        )
    needed = need.first + need.last + n_q - 1
    if slots < needed and (longest is None or longest > slots):
        raise ArgumentError(
            f"ring: the cache has {slots} slots and `{pattern.name}` needs {needed} with {n_q} queries: {need}, "
            f"plus the other queries' slots"
        )
    return need.first


def _empty_result(q: Tensor, cache: Cache) -> Result:
    """Return (out, lse) of a call without batch entries or heads."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return q.new_empty((*q.shape[:3], cache.v.shape[3])), lse
