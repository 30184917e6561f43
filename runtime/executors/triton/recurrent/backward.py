"""The backward pass of a linear recurrence, computed by kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler.recurrences.kernels.recurrence_kernels import adjoint_segment_stages, backward_stages
from attnc.runtime.executors.recurrent.chunk_forms import Gradients
from attnc.runtime.executors.recurrent.linear_inputs import Inputs
from attnc.runtime.executors.triton.recurrent.forward_passes import prepare_chunks
from attnc.runtime.executors.triton.recurrent.recurrence_tensors import (
    TORCH_TYPES,
    RecurrenceTensors,
    aligned,
    like,
)


def backward(call: RecurrenceTensors, inputs: Inputs, states: Tensor, d_out: Tensor, d_final: Tensor) -> Gradients:
    """Compute the gradients by name, in the dtypes of their inputs; `states` come from the forward pass."""
    p, form, tensors = call.problem, call.problem.form, call.tensors
    prepare_chunks(call, inputs)
    tensors["states"] = states
    tensors["dout"] = aligned(d_out, TORCH_TYPES[p.dtype])
    ends = call.states("ends", d_final, call.chunks)
    if form.columns:
        call.scratch("dout_in", p.wv)
    if form.is_corrected:
        for name in ("p", "dp", "read_adjoints"):
            call.scratch(name, p.wv)
    _prepare_gradients(call)
    for stage in backward_stages(form):
        if stage == "adjoints" and call.segments > 1:
            for segment_stage in adjoint_segment_stages(form):
                call.run(segment_stage)
        call.run(stage)
    gradients = {name: tensors[f"d{name}"] for name in ("v", *form.inputs)}
    gradients["state"] = ends[:, 0, : p.dk, : p.dv].reshape(inputs.state.shape)
    _add_gates(call, gradients)
    return {name: x.to(getattr(inputs, name).dtype) for name, x in gradients.items()}


def _prepare_gradients(call: RecurrenceTensors) -> None:
    """Allocate the tensors that the kernels write."""
    p, form, tensors = call.problem, call.problem.form, call.tensors
    dtype = TORCH_TYPES[p.dtype]
    for name in ("v", *form.inputs):
        tensors[f"d{name}"] = like(tensors[name], tuple(tensors[name].shape), dtype)
    for i, w in form.pairs:
        call.scratch(f"d_{form.pair_name(i, w)}", p.length)
    for name, width in (("gate_rows", p.dk), ("gate_columns", p.dv)):
        if name in tensors:
            tensors[f"d{name}"] = like(tensors["v"], (call.batch, call.heads, call.steps, width), torch.float32)
    for name in form.writers if form.is_split else ():
        call.scratch(f"{name}_so_far", p.wk, torch.float32)
    if form.is_delta:
        tensors["dbeta"] = torch.empty(call.batch, call.heads, call.steps, device=call.device)
    if form.has_vector_gate:
        call.scratch("dgate_pairs", 1, torch.float32)
        tensors["dgate_edges"] = torch.empty(
            call.parts("keys"), call.lanes * call.chunks, p.length, dtype=torch.float32, device=call.device
        )


def _add_gates(call: RecurrenceTensors, gradients: Gradients) -> None:
    """Add the gradients of gates and β; the contributions of programs to a gate are summed in fp32."""
    p, form, tensors = call.problem, call.problem.form, call.tensors
    if form.has_vector_gate:
        rows = tensors["dgate_edges"].sum(0) + tensors["dgate_pairs"][..., 0]
        rows = rows.view(call.batch, call.heads, call.chunks, p.length)[..., : p.used]
        steps = rows.flatten(2)[..., : call.steps]
        gradients["gate"] = steps.sum((0, 2)) if form.gate == "constant" else steps
    elif form.gate == "rows":
        gradients["gate"] = tensors["dgate_rows"]
    if form.columns:
        gradients["columns"] = tensors["dgate_columns"]
    if form.is_delta:
        gradients["beta"] = tensors["dbeta"]
