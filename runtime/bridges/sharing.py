"""Call a pattern on a model's batch: each sequence as if it were alone, without its padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.api.attention import Attention
from attnc.runtime.bridges.model_masks import BatchShare, ModelMask
from attnc.runtime.call.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.planning.cache_arguments import MOST_QUERIES
from attnc.runtime.planning.plans import need_of

Inputs = Mapping[str, object]


def attend_to_batch(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, mask: ModelMask, scale: float | None, inputs: Inputs
) -> Tensor:
    """Attend with q (B, Hq, Nq, dk), k (B, Hkv, columns, dk), v (B, Hkv, columns, dv) to out (B, Hq, Nq, dv).

    Column j of k is column `mask.start + j` of the batch; columns from `mask.stop` on are not read. The output for
    padding is 0. Raises ArgumentError, UnsupportedError.
    """
    columns = mask.stop - mask.start
    if q.shape[2] != mask.queries or k.shape[2] < columns:
        raise ArgumentError(
            f"the mask was made for {mask.queries} queries and {columns} keys, but the call has {q.shape[2]} and "
            f"{k.shape[2]}: cross-attention between different sequences is not supported"
        )
    k, v = k[:, :, :columns], v[:, :, :columns]
    if mask.sequences is not None:
        return _attend_packed(attend, q, k, v, mask.sequences, scale, inputs)
    if mask.shares is None:
        return _attend_unpadded(attend, q, k, v, mask.start, scale, inputs)
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    for share in mask.shares:
        rows = slice(max(share.first - mask.stop + mask.queries, 0), share.stop - mask.stop + mask.queries)
        if share.stop > share.first and rows.stop > rows.start:
            entries = list(share.entries)
            keys = slice(max(share.first - mask.start, 0), share.stop - mask.start)
            missing_keys = max(mask.start - share.first, 0)
            share_inputs = _inputs_of_share(attend, inputs, share, slice(share.first, share.stop), rows)
            tensors = (q[entries, :, rows], k[entries, :, keys], v[entries, :, keys])
            out[entries, :, rows] = _attend_unpadded(attend, *tensors, missing_keys, scale, share_inputs).to(out.dtype)
    return out


def _attend_unpadded(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, start: int, scale: float | None, inputs: Inputs
) -> Tensor:
    """Attend sequences without padding, whose keys of tokens before `start` are no longer in the cache."""
    if start:
        return _attend_sliding_cache(attend, q, k, v, start, scale, inputs)
    if q.shape[2] == k.shape[2]:
        out: Tensor = attend(q, k, v, scale=scale, **_as_any(inputs))
        return out
    return _attend_from_cache(attend, q, k, v, k.shape[2], scale, {**inputs})


def _attend_sliding_cache(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, start: int, scale: float | None, inputs: Inputs
) -> Tensor:
    """Attend over the keys of a sliding cache, as the ring that `prefill` reads: token t in slot t % slots."""
    heads = q.shape[1]
    need = need_of(attend.pattern, heads, heads // k.shape[1])
    kept = k.shape[2] - q.shape[2] + 1
    if need is None or need.first or need.last > kept:
        needed = "all tokens" if need is None else str(need)
        raise ArgumentError(
            f"`{attend.name}` may need {needed} of {start + k.shape[2]}, but the cache of this layer keeps the last "
            f"{kept}: use a cache of all tokens in the model, or a pattern that needs fewer"
        )
    shift = start % k.shape[2]
    return _attend_from_cache(
        attend, q, k.roll(shift, 2), v.roll(shift, 2), start + k.shape[2], scale, {**inputs, "ring": True}
    )


def _attend_from_cache(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, tokens: int, scale: float | None, options: Inputs
) -> Tensor:
    """Attend the last queries of a cache that holds `tokens` tokens."""
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    serve: Any = attend.prefill if needs_gradient or q.shape[2] > MOST_QUERIES else attend.decode
    out: Tensor = serve(q, k, v, kv_len=tokens, scale=scale, **options)
    return out


def _attend_packed(
    attend: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequence[Tensor],
    scale: float | None,
    inputs: Inputs,
) -> Tensor:
    """Attend batch entries that each pack several sequences."""
    if inputs:
        raise UnsupportedError(
            f"packed sequences (position_ids) with `{next(iter(inputs))}`, an input of `{attend.name}`, are not "
            f"supported: use padding instead"
        )
    entries = (slice(entry, entry + 1) for entry in range(q.shape[0]))
    parts = [
        attend(q[entry], k[entry], v[entry], scale=scale, cu_seqlens=cumulative_lengths)
        for entry, cumulative_lengths in zip(entries, sequences, strict=True)
    ]
    return torch.cat(parts)


def _inputs_of_share(
    attend: Attention, inputs: Inputs, share: BatchShare, tokens: slice, rows: slice
) -> dict[str, object]:
    """Return the inputs restricted to some batch entries and their tokens."""
    dims = {tensor.name: tensor.dims for tensor in attend.pattern.tensors}
    cuts: dict[object, Any] = {"batch": list(share.entries), "token": tokens, "key": tokens, "query": rows}
    result: dict[str, object] = {}
    for name, value in inputs.items():
        x = torch.as_tensor(value)
        for axis, dim in enumerate(dims.get(name, ())):
            if dim in cuts and x.shape[axis] > 1:
                index: list[Any] = [slice(None)] * axis
                index.append(cuts[dim])
                x = x[tuple(index)]
        result[name] = x
    return result


def _as_any(inputs: Inputs) -> dict[str, Any]:
    return dict(inputs)
