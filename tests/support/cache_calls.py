"""Caches filled as a server fills them, with NaN in every slot that must not be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnc.runtime.api.attention import Attention

Kind = Literal["slots", "pages", "ring"]
NAN = float("nan")


@dataclass(frozen=True)
class Filled:
    """The cache of a call, as arguments of `decode`."""

    k: Tensor
    v: Tensor
    given: Mapping[str, Any]


def filled(
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    seen: Tensor,
    kind: Kind = "slots",
    *,
    slots: int | None = None,
    first: int = 0,
    page: int = 16,
) -> Filled:
    """Fill a cache with the first `lengths` tokens of k and v (B, Hkv, N, d); `seen`, bool (B, Hkv, N): tokens not NaN.

    `slots`: the size of a ring cache, in which the `first` tokens stay.
    """
    longest = max(lengths)
    arguments: dict[str, Any] = {"kv_len": list(lengths)}
    if kind == "pages":
        columns = -(-longest // page) + 1
        table = torch.randperm(len(lengths) * columns).reshape(len(lengths), columns).to(torch.int32)
        shape: tuple[int, ...] = (table.numel(), k.shape[1], page)
        arguments["block_table"] = table
    else:
        shape = len(lengths), k.shape[1], slots or longest + 37
        arguments["ring"] = kind == "ring"
    caches = [torch.full((*shape, x.shape[3]), NAN, dtype=x.dtype) for x in (k, v)]
    for entry, length in enumerate(lengths):
        for t in range(length):
            if kind == "pages":
                row, slot = int(arguments["block_table"][entry, t // page]), t % page
            else:
                turned = first + (t - first) % max(shape[2] - first, 1)
                row, slot = entry, t if t < first or kind == "slots" else turned
            for x, cache in zip((k, v), caches, strict=True):
                cache[row, :, slot] = torch.where(seen[entry, :, t, None], x[entry, :, t], NAN)
    return Filled(caches[0], caches[1], arguments)


def seen_by_last(
    attention: Attention, n: int, n_q: int, heads: int, kv_heads: int, inputs: Mapping[str, Any]
) -> Tensor:
    """Return the tokens that any of the last queries sees, for the first batch entry: bool (1, Hkv, n)."""
    relation_inputs = {name: x for name, x in inputs.items() if name in attention.relation_inputs}
    masks = [
        attention.mask(n, head=h, heads=heads, kv_heads=kv_heads, **relation_inputs).reshape(-1, n, n)[0]
        for h in range(heads)
    ]
    seen = torch.stack(masks)[:, n - n_q :].any(1)
    return seen.reshape(1, kv_heads, -1, n).any(2)


def of_last(attention: Attention, inputs: Mapping[str, Any], n_q: int) -> dict[str, Any]:
    """Return the inputs of a whole call restricted to its last queries."""
    last_inputs = dict(inputs)
    for tensor in attention._pattern.tensors:
        for axis, dim in enumerate(tensor.dims if tensor.name in last_inputs else ()):
            if dim == "query":
                x = last_inputs[tensor.name]
                last_inputs[tensor.name] = x.narrow(axis, x.shape[axis] - n_q, n_q)
    return last_inputs
