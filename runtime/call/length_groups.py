"""Batch entries of one length, which form one call of a pattern's last rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.runtime.call.caches import Cache

Result = tuple[Tensor, "Tensor | None"]


@dataclass(frozen=True)
class LengthGroup:
    """The batch entries of one length."""

    entries: tuple[int, ...]
    cache: Cache
    inputs: Mapping[str, object]

    @property
    def length(self) -> int:
        """The number of tokens of each entry."""
        return self.cache.lengths[0]


def length_groups(pattern: Pattern, cache: Cache, inputs: Mapping[str, object]) -> Iterator[LengthGroup]:
    """Yield the batch entries of each length."""
    for length in sorted(set(cache.lengths)):
        entries = tuple(i for i, entry_length in enumerate(cache.lengths) if entry_length == length)
        yield LengthGroup(entries, cache.of(entries), dict(cut(pattern, inputs, cache, entries, length)))


def cut(
    pattern: Pattern, inputs: Mapping[str, object], cache: Cache, entries: Sequence[int], length: int
) -> Iterator[tuple[str, object]]:
    """Yield the inputs of some batch entries; inputs by token are cut to the first `length` entries."""
    dims = {tensor.name: tensor.dims for tensor in pattern.tensors}
    for name, value in inputs.items():
        tensor: Any = value
        if name in dims and not hasattr(tensor, "shape") and tensor is not None:
            tensor = torch.as_tensor(tensor)
        tensor_dims = dims.get(name, ())
        for axis, dim in enumerate(tensor_dims if len(getattr(tensor, "shape", ())) == len(tensor_dims) else ()):
            at: list[Any] = [slice(None)] * len(tensor_dims)
            if dim in ("token", "key") and tensor.shape[axis] >= length:
                at[axis] = slice(length)
            elif dim == "batch" and tensor.shape[axis] == len(cache.lengths) and len(entries) < len(cache.lengths):
                at[axis] = list(entries)
            tensor = tensor[tuple(at)]
        yield name, tensor


def by_length(
    pattern: Pattern,
    q: Tensor,
    cache: Cache,
    inputs: Mapping[str, object],
    run: Callable[[Tensor, LengthGroup], Result],
) -> Result:
    """Return (out, lse) of all batch entries in their order, those of each length by `run`, from their queries."""
    if not (q.shape[0] and q.shape[1]):
        lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        return q.new_empty((*q.shape[:3], cache.v.shape[3])), lse
    groups = list(length_groups(pattern, cache, inputs))
    if len(groups) == 1:
        return run(q, groups[0])
    outs, lses = zip(*(run(q[list(group.entries)], group) for group in groups), strict=True)
    order = order_of(groups).to(q.device)
    return torch.cat(outs)[order], None if any(x is None for x in lses) else torch.cat(lses)[order]


def order_of(groups: Sequence[LengthGroup]) -> Tensor:
    """Return the indices that put results of groups, one after another, into the order of batch entries."""
    return torch.tensor([entry for group in groups for entry in group.entries], dtype=torch.int64).argsort()
