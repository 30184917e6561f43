"""Several sequences in one call: each chooses by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.lowering.specialise import Window
from attnc.compiler.verify_ir import verified
from attnc.runtime.call_inputs import CallInputs
from attnc.runtime.fallbacks import HOST_WAIT, SEQUENCES, note
from attnc.runtime.plans import documents_of_call
from attnc.runtime.tensor_checks import as_tensor, completed

Result = tuple[Tensor, "Tensor | None"]
Run = Callable[[Tensor, Tensor, Tensor, CallInputs], Result]


@verified
def alone(pattern: ir.Pattern) -> ir.Pattern:
    """The pattern of one of the sequences."""
    tensors = tuple(tensor for tensor in pattern.tensors if not _is_boundaries(tensor))
    return replace(pattern, documents=None, tensors=tensors)


def _is_boundaries(tensor: ir.Tensor) -> bool:
    return ir.BOUNDARIES in tensor.dims


def by_sequence(pattern: ir.Pattern, run: Run, q: Tensor, k: Tensor, v: Tensor, given: CallInputs) -> Result:
    """(out, lse) of the sequences that a call's boundaries or documents cut, one after another."""
    assert pattern.documents is not None
    cuts = given.inputs[pattern.documents.name]
    ends = cuts.cpu().numpy() if isinstance(cuts, Tensor) else np.asarray(cuts)
    if isinstance(cuts, Tensor) and cuts.is_cuda:
        note(pattern.name, HOST_WAIT, f"`{pattern.documents.name}` says where sequences end")
    found = documents_of_call(pattern, ends, q.shape[2], k.shape[2])
    note(pattern.name, SEQUENCES, "each chooses by itself")
    if len(found) == 1:
        return _one_after_another(pattern, found[0], run, q, k, v, given)
    pairs = []
    for i, windows in enumerate(found):
        own = replace(given, sizes=replace(given.sizes, batch=1), inputs=_of_entry(pattern, given.inputs, i))
        pairs.append(_one_after_another(pattern, windows, run, q[i : i + 1], k[i : i + 1], v[i : i + 1], own))
    if not pairs:
        return _nothing(q, k, v)
    lses = [lse for _, lse in pairs if lse is not None]
    return torch.cat([out for out, _ in pairs]), torch.cat(lses) if lses else None


def _one_after_another(
    pattern: ir.Pattern, windows: Iterable[Window], run: Run, q: Tensor, k: Tensor, v: Tensor, given: CallInputs
) -> Result:
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
        return _nothing(q, k, v)
    return torch.cat(outs, 2), None if lses[0] is None else torch.cat([x for x in lses if x is not None], 2)


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> Result:
    return q.new_zeros((*q.shape[:3], v.shape[-1])) + 0 * (q.sum() + k.sum() + v.sum()), None


def _of_entry(pattern: ir.Pattern, inputs: Mapping[str, object], entry: int) -> dict[str, object]:
    """The inputs of one batch entry."""
    found = dict(inputs)
    for tensor in pattern.tensors:
        x = inputs.get(tensor.name)
        if "batch" in tensor.dims and x is not None:
            whole = as_tensor(x)
            axis = tensor.dims.index("batch")
            found[tensor.name] = whole if whole.shape[axis] == 1 else whole.narrow(axis, entry, 1)
    return found


def _cut(pattern: ir.Pattern, inputs: Mapping[str, object], window: Window) -> dict[str, object]:
    """The inputs of one sequence."""
    found: dict[str, object] = {}
    for tensor in pattern.tensors:
        if _is_boundaries(tensor) or tensor.made is not None or tensor.name not in inputs:
            continue
        x = inputs[tensor.name]
        whole = as_tensor(x)
        for i, dim in enumerate(tensor.dims):
            if dim == "query":
                whole = whole.narrow(i, window.row, window.n_q)
            elif dim in ("key", "token"):
                whole = whole.narrow(i, window.key, window.n_k)
        found[tensor.name] = whole
    return dict(completed(pattern, found))
