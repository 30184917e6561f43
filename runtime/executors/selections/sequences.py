"""Several sequences in one call: each sequence selects separately."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attnc.compiler import ir
from attnc.compiler.ir.verify_ir import verified
from attnc.compiler.lowering.specialise import Window
from attnc.runtime.call.arguments import CallArguments
from attnc.runtime.call.tensor_checks import as_tensor, completed
from attnc.runtime.fallbacks import HOST_WAIT, SEQUENCES, note
from attnc.runtime.planning.plans import documents_of_call

Result = tuple[Tensor, "Tensor | None"]
Run = Callable[[CallArguments], Result]


@verified
def alone(pattern: ir.Pattern) -> ir.Pattern:
    """Return the pattern of a single sequence."""
    tensors = tuple(tensor for tensor in pattern.tensors if not _is_boundaries(tensor))
    return replace(pattern, documents=None, tensors=tensors)


def _is_boundaries(tensor: ir.Tensor) -> bool:
    return ir.BOUNDARIES in tensor.dims


def by_sequence(pattern: ir.Pattern, run: Run, call: CallArguments) -> Result:
    """Compute (out, lse) of the sequences that boundaries or documents delimit, one sequence after another."""
    assert pattern.documents is not None
    boundaries = call.inputs[pattern.documents.name]
    ends = boundaries.cpu().numpy() if isinstance(boundaries, Tensor) else np.asarray(boundaries)
    if isinstance(boundaries, Tensor) and boundaries.is_cuda:
        note(pattern.name, HOST_WAIT, f"`{pattern.documents.name}` defines where sequences end, and the host reads it")
    sequences_by_entry = documents_of_call(pattern, ends, call.sizes.n_q, call.sizes.n_k)
    note(pattern.name, SEQUENCES, "each sequence selects separately")
    if len(sequences_by_entry) == 1:
        return _one_after_another(pattern, sequences_by_entry[0], run, call)
    pairs = []
    for i, windows in enumerate(sequences_by_entry):
        q, k, v = (x[i : i + 1] for x in (call.q, call.k, call.v))
        inputs, sizes = _entry_inputs(pattern, call.inputs, i), replace(call.sizes, batch=1)
        entry_call = replace(call, q=q, k=k, v=v, inputs=inputs, known_sizes=sizes)
        pairs.append(_one_after_another(pattern, windows, run, entry_call))
    if not pairs:
        return _nothing(call)
    lses = [lse for _, lse in pairs if lse is not None]
    return torch.cat([out for out, _ in pairs]), torch.cat(lses) if lses else None


def _one_after_another(pattern: ir.Pattern, windows: Iterable[Window], run: Run, call: CallArguments) -> Result:
    outs, lses = [], []
    for window in windows:
        rows, keys = slice(window.row, window.row + window.n_q), slice(window.key, window.key + window.n_k)
        inputs = _cut(pattern, call.inputs, window)
        tensors = {**call.tensors, **{name: x for name, x in inputs.items() if isinstance(x, Tensor)}}
        q, k, v = call.q[:, :, rows], call.k[:, :, keys], call.v[:, :, keys]
        sizes = replace(call.sizes, n_q=window.n_q, n_k=window.n_k)
        out, lse = run(replace(call, q=q, k=k, v=v, inputs=inputs, tensors=tensors, known_sizes=sizes))
        outs.append(out)
        lses.append(lse)
    if not outs:
        return _nothing(call)
    return torch.cat(outs, 2), None if lses[0] is None else torch.cat([x for x in lses if x is not None], 2)


def _nothing(call: CallArguments) -> Result:
    q, k, v = call.q, call.k, call.v
    return q.new_zeros((*q.shape[:3], v.shape[-1])) + 0 * (q.sum() + k.sum() + v.sum()), None


def _entry_inputs(pattern: ir.Pattern, inputs: Mapping[str, object], entry: int) -> dict[str, object]:
    """Return the inputs of one batch entry."""
    entry_inputs = dict(inputs)
    for tensor in pattern.tensors:
        x = inputs.get(tensor.name)
        if "batch" in tensor.dims and x is not None:
            whole = as_tensor(x)
            axis = tensor.dims.index("batch")
            entry_inputs[tensor.name] = whole if whole.shape[axis] == 1 else whole.narrow(axis, entry, 1)
    return entry_inputs


def _cut(pattern: ir.Pattern, inputs: Mapping[str, object], window: Window) -> dict[str, object]:
    """Return the inputs of one sequence."""
    sequence_inputs: dict[str, object] = {}
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
        sequence_inputs[tensor.name] = whole
    return dict(completed(pattern, sequence_inputs))
