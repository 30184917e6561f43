"""A call of a pattern for a model's batch: each sequence as if it were alone, without its padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnc.runtime.attention import Attention
from attnc.runtime.bridges.model_masks import BatchShare, ModelMask
from attnc.runtime.call_errors import ArgumentError, UnsupportedError
from attnc.runtime.plans import need_of
from attnc.runtime.serving import MOST_QUERIES

Inputs = Mapping[str, object]


def attend_to_batch(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, mask: ModelMask, scale: float | None, inputs: Inputs
) -> Tensor:
    """q (B, Hq, Nq, dk) over k (B, Hkv, columns, dk), v (B, Hkv, columns, dv): out (B, Hq, Nq, dv), 0 for padding.

    Column j of k stands for the column `mask.start + j` of the batch; those from `mask.stop` on are not read.
    Raises ArgumentError, UnsupportedError.
    """
    columns = mask.stop - mask.start
    if q.shape[2] != mask.queries or k.shape[2] < columns:
        raise ArgumentError(
            f"the mask was made for {mask.queries} queries and {columns} keys, and there are {q.shape[2]} and "
            f"{k.shape[2]}: queries and keys of different sequences (cross-attention) have no pattern of tokens"
        )
    k, v = k[:, :, :columns], v[:, :, :columns]
    if mask.sequences is not None:
        return _packed(attend, q, k, v, mask.sequences, scale, inputs)
    if mask.shares is None:
        return _together(attend, q, k, v, mask.start, scale, inputs)
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    for share in mask.shares:
        rows = slice(max(share.first - mask.stop + mask.queries, 0), share.stop - mask.stop + mask.queries)
        if share.stop > share.first and rows.stop > rows.start:
            at = list(share.entries)
            keys = slice(max(share.first - mask.start, 0), share.stop - mask.start)
            begins = max(mask.start - share.first, 0)
            own = _cut(attend, inputs, share, slice(share.first, share.stop), rows)
            of_share = (q[at, :, rows], k[at, :, keys], v[at, :, keys])
            out[at, :, rows] = _together(attend, *of_share, begins, scale, own).to(out.dtype)
    return out


def _together(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, start: int, scale: float | None, inputs: Inputs
) -> Tensor:
    """Sequences without padding, the keys of whose tokens before `start` are gone from the cache."""
    if start:
        return _of_last_keys(attend, q, k, v, start, scale, inputs)
    if q.shape[2] == k.shape[2]:
        out: Tensor = attend(q, k, v, scale=scale, **_as_any(inputs))
        return out
    return _from_cache(attend, q, k, v, k.shape[2], scale, {**inputs})


def _of_last_keys(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, start: int, scale: float | None, inputs: Inputs
) -> Tensor:
    """The keys of a sliding cache, as the ring that `prefill` reads: token t in slot t % slots."""
    heads = q.shape[1]
    need = need_of(attend.pattern, heads, heads // k.shape[1])
    most = k.shape[2] - q.shape[2] + 1
    if need is None or need.first or need.last > most:
        which = "all tokens" if need is None else str(need)
        raise ArgumentError(
            f"`{attend.name}` may need {which} of {start + k.shape[2]}, and the cache of this layer keeps the last "
            f"{most}: give the model a cache of all tokens, or take a pattern that does not ask for more"
        )
    turn = start % k.shape[2]
    return _from_cache(attend, q, k.roll(turn, 2), v.roll(turn, 2), start + k.shape[2], scale, {**inputs, "ring": True})


def _from_cache(
    attend: Attention, q: Tensor, k: Tensor, v: Tensor, tokens: int, scale: float | None, options: Inputs
) -> Tensor:
    """The last queries of so many tokens."""
    differs = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    serve: Any = attend.prefill if differs or q.shape[2] > MOST_QUERIES else attend.decode
    out: Tensor = serve(q, k, v, kv_len=tokens, scale=scale, **options)
    return out


def _packed(
    attend: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequence[Tensor],
    scale: float | None,
    inputs: Inputs,
) -> Tensor:
    """Each batch entry packs sequences of its own."""
    if inputs:
        raise UnsupportedError(
            f"packed sequences (position_ids) beside `{next(iter(inputs))}`, an input of `{attend.name}`, are not "
            f"supported: pad them instead"
        )
    one = (slice(i, i + 1) for i in range(q.shape[0]))
    parts = [attend(q[i], k[i], v[i], scale=scale, cu_seqlens=own) for i, own in zip(one, sequences, strict=True)]
    return torch.cat(parts)


def _cut(attend: Attention, inputs: Inputs, share: BatchShare, tokens: slice, rows: slice) -> dict[str, object]:
    """The inputs of some batch entries and of their tokens."""
    dims = {tensor.name: tensor.dims for tensor in attend.pattern.tensors}
    cuts: dict[object, Any] = {"batch": list(share.entries), "token": tokens, "key": tokens, "query": rows}
    result: dict[str, object] = {}
    for name, given in inputs.items():
        x = torch.as_tensor(given)
        for axis, dim in enumerate(dims.get(name, ())):
            if dim in cuts and x.shape[axis] > 1:
                at: list[Any] = [slice(None)] * axis
                at.append(cuts[dim])
                x = x[tuple(at)]
        result[name] = x
    return result


def _as_any(inputs: Inputs) -> dict[str, Any]:
    return dict(inputs)
