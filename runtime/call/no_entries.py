"""Calls without batch entries: the call runs with one entry of zeros, whose results are dropped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern


def has_no_entries(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Check whether q, k and v, four-dimensional, have no batch entry, in a call that is not traced."""
    return not torch.compiler.is_compiling() and all(x.dim() == 4 and x.shape[0] == 0 for x in (q, k, v))


def with_one_entry(x: Tensor, promise: str | None = None) -> Tensor:
    """Return the tensor (0, …) with an entry of zeros, or of ones where it promises to be positive: (1, …)."""
    filled = x.new_ones if promise == "positive" else x.new_zeros
    return torch.cat([x, filled(1, *x.shape[1:])])


def inputs_with_one_entry(pattern: Pattern, inputs: Mapping[str, object]) -> dict[str, object]:
    """Return the inputs of a call; an input without a batch entry gets one."""
    promises = {tensor.name: tensor.refinement for tensor in pattern.tensors if "batch" in tensor.dims}
    return {
        name: with_one_entry(x, promises[name])
        if name in promises and isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == 0
        else x
        for name, x in inputs.items()
    }
