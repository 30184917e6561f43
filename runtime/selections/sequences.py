"""Several sequences in one call: each chooses by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.lowering.specialise import Window
from attnc.runtime.call import completed
from attnc.runtime.given import Given
from attnc.runtime.plans import documents_of_call

Result = tuple[Tensor, "Tensor | None"]
Run = Callable[[Tensor, Tensor, Tensor, Given], Result]


def alone(pattern: ir.Pattern) -> ir.Pattern:
    """The pattern of one of the sequences."""
    tensors = tuple(tensor for tensor in pattern.tensors if tensor is not pattern.documents)
    return replace(pattern, documents=None, tensors=tensors)


def by_sequence(pattern: ir.Pattern, run: Run, q: Tensor, k: Tensor, v: Tensor, given: Given) -> Result:
    """(out, lse) of the sequences that a call's boundaries cut, one after another."""
    assert pattern.documents is not None
    boundaries = given.inputs[pattern.documents.name]
    ends = boundaries.cpu().numpy() if isinstance(boundaries, Tensor) else np.asarray(boundaries)
    (windows,) = documents_of_call(pattern, ends, q.shape[2], k.shape[2])
    outs, lses = [], []
    for window in windows:
        rows, keys = slice(window.row, window.row + window.n_q), slice(window.key, window.key + window.n_k)
        sizes = replace(given.sizes, n_q=window.n_q, n_k=window.n_k)
        own = replace(given, sizes=sizes, inputs=_cut(pattern, given.inputs, window))
        real = {name: x for name, x in own.inputs.items() if isinstance(x, Tensor)}
        out, lse = run(q[:, :, rows], k[:, :, keys], v[:, :, keys], replace(own, real={**given.real, **real}))
        outs.append(out)
        lses.append(lse)
    if not outs:
        nothing = q.new_zeros((*q.shape[:3], v.shape[-1])) + 0 * (q.sum() + k.sum() + v.sum())
        return nothing, None
    return torch.cat(outs, 2), None if lses[0] is None else torch.cat([x for x in lses if x is not None], 2)


def _cut(pattern: ir.Pattern, inputs: Mapping[str, object], window: Window) -> dict[str, object]:
    """The inputs of one sequence."""
    found: dict[str, object] = {}
    for tensor in pattern.tensors:
        if tensor is pattern.documents or tensor.made is not None or tensor.name not in inputs:
            continue
        x = inputs[tensor.name]
        whole = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))
        for i, dim in enumerate(tensor.dims):
            if dim == "query":
                whole = whole.narrow(i, window.row, window.n_q)
            elif dim in ("key", "token"):
                whole = whole.narrow(i, window.key, window.n_k)
        found[tensor.name] = whole
    return dict(completed(pattern, found))
