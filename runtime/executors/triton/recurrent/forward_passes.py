"""The forward pass of a linear recurrence, computed by kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from attnc.compiler.recurrences.kernels.recurrence_kernels import fused_stages, segment_stages
from attnc.runtime.executors.recurrent.linear_inputs import Inputs
from attnc.runtime.executors.triton.recurrent.recurrence_tensors import (
    TORCH_TYPES,
    RecurrenceTensors,
    aligned,
    like,
)


def prepare_chunks(call: RecurrenceTensors, inputs: Inputs) -> None:
    """Add the inputs to the call's tensors, compute the decays of its chunks and solve its corrections."""
    p, form, tensors = call.problem, call.problem.form, call.tensors
    _add_inputs(call, inputs)
    for reader in form.readers:
        call.scratch(f"{reader}_in", p.wk)
    for writer in form.writers:
        call.scratch(f"{writer}_out", p.wk)
    for i, w in form.pairs:
        name = form.pair_name(i, w)
        exact = form.is_corrected and name == form.triangle
        call.scratch(name, p.length, torch.float32 if exact else None)
    count = call.lanes * call.chunks
    width = p.wk if form.gate == "rows" else 1
    tensors["total"] = torch.empty(count, width, dtype=torch.float32, device=call.device)
    call.run("prepare")
    if form.columns:
        call.scratch("v_out", p.wv)
        tensors["total_columns"] = torch.empty(count, p.wv, dtype=torch.float32, device=call.device)
        call.run("columns")
    if form.is_corrected:
        for name, width in (("inverse", p.length), ("solved_reads", p.wk), ("solved_values", p.wv)):
            call.scratch(name, width)
        call.run("solve")


def _add_inputs(call: RecurrenceTensors, inputs: Inputs) -> None:
    """Add the inputs to the call's tensors, in the dtypes and layouts that kernels read."""
    form, tensors, dtype = call.problem.form, call.tensors, TORCH_TYPES[call.problem.dtype]
    for name in ("v", *form.inputs):
        tensors[name] = aligned(getattr(inputs, name), dtype)
    _add_gates(call, inputs)


def _add_gates(call: RecurrenceTensors, inputs: Inputs) -> None:
    """Add gates, β and resets to the call's tensors."""
    form, tensors = call.problem.form, call.tensors
    if inputs.gate is not None:
        if form.gate == "rows":
            tensors["gate_rows"] = aligned(inputs.gate, torch.float32)
        elif form.gate == "constant":
            tensors["gate"] = inputs.gate.float().contiguous()
        else:
            tensors["gate"] = inputs.gate.float()
    if inputs.columns is not None:
        tensors["gate_columns"] = aligned(inputs.columns, torch.float32)
    if inputs.beta is not None:
        tensors["beta"] = inputs.beta.float()
    if inputs.resets is not None:
        tensors["resets"] = inputs.resets.to(torch.int32).contiguous()


def forward(call: RecurrenceTensors, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Compute (out (B, H, T, C), states (lanes, chunks + 1, wk, wv))."""
    p, tensors = call.problem, call.tensors
    prepare_chunks(call, inputs)
    states = call.states("states", inputs.state, 0)
    if p.form.is_corrected:
        call.scratch("p", p.wv)
    for stage in segment_stages(p.form) if call.segments > 1 else ():
        call.run(stage)
    call.run("states")
    tensors["out"] = like(inputs.q, (*inputs.q.shape[:3], p.dv), TORCH_TYPES[p.dtype])
    call.run("outputs")
    return tensors["out"], states


def walk_chunks(call: RecurrenceTensors, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Compute (out (B, H, T, C), the final state (B, H, R, C)) without gradients; `can_walk` must hold.

    The state stays on the chip between chunks. Separate kernels prepare rows only if the class, or a split of the
    sequence, requires that.
    """
    p, tensors = call.problem, call.tensors
    call.at_edges = True
    stages: tuple[str, ...] = ("walk",)
    if p.can_fuse and call.segments == 1:
        _add_inputs(call, inputs)
        _add_weights(call)
        stages = fused_stages(p.form)
    else:
        prepare_chunks(call, inputs)
    states = call.states("states", inputs.state, 0)
    tensors["out"] = like(inputs.q, (*inputs.q.shape[:3], p.dv), TORCH_TYPES[p.dtype])
    for stage in (*(segment_stages(p.form) if call.segments > 1 else ()), *stages):
        call.run(stage)
    return tensors["out"], states[:, -1, : p.dk, : p.dv].reshape(inputs.state.shape).clone()


def _add_weights(call: RecurrenceTensors) -> None:
    """Allocate the tensors that the kernel `weights` writes."""
    if not call.problem.form.has_weights:
        return
    call.scratch("pair_weights", call.problem.length)
    for name in ("entering", "leaving"):
        call.scratch(name, 1, torch.float32)
    call.tensors["total"] = torch.empty(call.lanes * call.chunks, dtype=torch.float32, device=call.device)


def step_tokens(call: RecurrenceTensors, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Compute (out (B, H, T, C), the final state (B, H, R, C)), token by token in one kernel."""
    p, tensors = call.problem, call.tensors
    _add_inputs(call, inputs)
    tensors["begun"] = inputs.state.float().contiguous()
    tensors["last"] = torch.empty_like(tensors["begun"])
    tensors["out"] = like(inputs.q, (*inputs.q.shape[:3], p.dv), TORCH_TYPES[p.dtype])
    call.run("step")
    return tensors["out"], tensors["last"]
