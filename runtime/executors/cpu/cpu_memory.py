"""The memory of calls of the cpu executor, from their plans: what `executor` allocates, in order.

With e bytes an element of q, s of an LSE (4, or 8 for fp64) and w the wider of dk and dv:

- saved: e · (q + k + v + out) + s · lse, in elements;
- forward: padding (e · w per row of q, or of k and v, if dk and dv differ), the output in fp32 if half types are
  merged, and the largest call;
- backward: padding, gradients in fp32 if half types are summed, and the largest call.

A kernel call on R rows of queries and K rows of keys, counting each query head and each kv head, allocates its output
(e · R · w + s · R), or gradients and a copy of one operand (s · w · (2 · R + 2 · K)); copies of q, k and v (and of the
other operands of the backward) if rows are gathered; in the backward of half types all operands and the mask in fp32;
the mask if it is not cached; and the kernel's buffers, as in torch 2.13: for each thread, for blocks of 32, 64 or 256
rows and 512 keys, scores and output in fp32 (forward, for half types also in the half type) or two scores (backward);
and in bfloat16, on processors with matrix tiles (AMX), k and v packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from attnc.compiler.planning.cpu_plan import Memory, Plan
from attnc.runtime.disk.machine_key import has_matrix_tiles
from attnc.runtime.executors.cpu.bound_plan import BoundPlan
from attnc.runtime.executors.cpu.strided_calls import (
    ExactWindow,
    KernelCall,
    StripBlock,
    calls_of,
)
from attnc.runtime.settings import SETTINGS

HALF = ("bfloat16", "float16")

_PACKING = 64
"""Minimum number of rows for which the kernel packs bfloat16 keys and values."""


@dataclass(frozen=True)
class _Kind:
    """Bytes of an element and of an LSE, the row width, and whether the dtype is a half type.

    Gradients take as many bytes as an LSE until they are rounded.
    """

    element: int
    lse: int
    width: int
    half: bool
    packs: bool
    threads: int


def memory_of(plan: Plan, dk: int, dv: int, dtype: str) -> Memory:
    """Return the memory of a call with these widths and dtype, contiguous tensors and torch's number of threads."""
    half = dtype in HALF
    size = 2 if half else 8 if dtype == "float64" else 4
    packs = dtype == "bfloat16" and has_matrix_tiles()
    kind = _Kind(size, max(size, 4), max(dk, dv), half, packs, torch.get_num_threads())
    rows, keys = plan.batch * plan.heads * plan.n_q, plan.batch * plan.kv_heads * plan.n_k
    saved = size * (rows + keys) * (dk + dv) + kind.lse * rows
    program = BoundPlan(plan)
    if not rows * keys:
        return Memory(saved, 0, 0)
    calls = calls_of(plan, merged=plan.batch > 1)
    narrow = size * kind.width * (rows + keys if dk < dv else keys if dv < dk else 0)
    if program.only is not None and dk <= dv:
        forward = narrow + max(_forward_buffers(program.only, kind), kind.lse * rows)
    else:
        fp32_output = 4 * rows * dv if half and program.merges else 0
        forward = narrow + fp32_output + max((_forward(call, kind, dv) for call in calls), default=0)
    if program.only is not None and dk == dv and not program.adds:
        operand_bytes = size * kind.width * (rows + 2 * keys)
        kernel = _gradients(program.only, kind) - operand_bytes + _backward_buffers(program.only, kind)
        kernel += _in_single(program.only, kind)
        return Memory(saved, forward, rows + max(kernel, kind.lse * kind.width * (rows + 2 * keys)))
    return Memory(saved, forward, _whole_backward(program, calls, kind, (dk, dv), rows, keys))


def _whole_backward(
    program: BoundPlan, calls: tuple[KernelCall, ...], kind: _Kind, widths: tuple[int, int], rows: int, keys: int
) -> int:
    """Return the bytes of a backward, which sums half types in fp32 and casts the sums at the end."""
    dk, dv = widths
    narrow = kind.element * kind.width * (rows + keys if dk < dv else 2 * rows + keys if dv < dk else 0)
    parts = ((rows * dk, program.merges), (keys * dk, program.adds), (keys * dv, program.adds))
    sums = sum(4 * n for n, added in parts if kind.half and added)
    cast = sum(kind.element * n for n, added in parts if kind.half and added)
    largest = max((_backward(call, kind, program.adds) for call in calls), default=0)
    return max(sums - cast + narrow + rows + largest, sums)


def _forward(call: KernelCall, kind: _Kind, dv: int) -> int:
    """Return the bytes of one forward call: while the kernel runs, or while its rows are merged."""
    rows = call.queries.rows
    results = (kind.element * kind.width + kind.lse) * rows
    copied = kind.element * kind.width * (_gathered(call.queries) + 2 * _gathered(call.keys))
    merging = 0 if call.fresh else kind.lse * rows * (2 + (dv if kind.half else 0))
    return _mask(call, kind) + copied + results + max(_forward_buffers(call, kind), merging)


def _backward(call: KernelCall, kind: _Kind, adds: bool) -> int:
    """Return the bytes of one backward call: while the kernel runs, or while its gradients are added."""
    queries, keys = _gathered(call.queries), _gathered(call.keys)
    copied = kind.element * kind.width * (3 * queries + 2 * keys) + kind.lse * queries
    gradients = kind.lse * kind.width * (call.queries.rows + 2 * call.keys.rows)
    adding = gradients + kind.lse * kind.width * call.keys.rows if adds else gradients
    kernel = _in_single(call, kind) + _gradients(call, kind) + _backward_buffers(call, kind)
    return _mask(call, kind) + copied + max(kernel, adding)


def _gradients(call: KernelCall, kind: _Kind) -> int:
    """Return the bytes of the kernel's gradients and its copy of one operand by row."""
    return 2 * kind.lse * kind.width * (call.queries.rows + call.keys.rows)


def _in_single(call: KernelCall, kind: _Kind) -> int:
    """Return the bytes of the fp32 operands that the backward of half types reads."""
    mask = prod((call.queries.strip.length, call.keys.strip.length)) if isinstance(call.mask, ExactWindow | int) else 0
    return 4 * (kind.width * (3 * call.queries.rows + 2 * call.keys.rows) + mask) if kind.half else 0


def _gathered(block: StripBlock) -> int:
    """Return the number of rows that no strides can express and that are copied."""
    axes = [axis for axis in block.strip.axes if axis.length > 1]
    outer = [axis for axis in block.strip.axes if axis.count > 1]
    return block.rows if len(axes) > 1 or len(outer) + (block.outer.size > 1) > 1 else 0


def _mask(call: KernelCall, kind: _Kind) -> int:
    """Return the bytes of a mask that is built for the call."""
    if not isinstance(call.mask, ExactWindow | int):
        return 0
    elements = prod((call.queries.strip.length, call.keys.strip.length))
    kept = isinstance(call.mask, int) and elements <= SETTINGS.mask_elements
    return 0 if kept else elements * (2 + kind.element)


def _blocks(call: KernelCall) -> tuple[int, int]:
    """Return the rows and keys of the kernel's blocks."""
    rows, keys = call.queries.strip.length, call.keys.strip.length
    return (256 if rows >= 768 else 64 if rows >= 192 else 32), min(keys, 512)


def _forward_buffers(call: KernelCall, kind: _Kind) -> int:
    rows, keys = _blocks(call)
    whole = kind.lse * rows * (keys + 2 + kind.width)
    if not kind.half:
        return kind.threads * whole
    length = call.keys.strip.length
    if not kind.packs or call.queries.strip.length < _PACKING:
        return kind.threads * (whole + kind.element * rows * keys)
    packed = 2 * kind.element * kind.width * (call.keys.rows // length) * (length + length % 2)
    return kind.threads * (whole + kind.element * (keys + keys % 2) * (rows + kind.width)) + packed


def _backward_buffers(call: KernelCall, kind: _Kind) -> int:
    rows, keys = _blocks(call)
    return kind.threads * kind.lse * rows * (2 * keys + 1)
