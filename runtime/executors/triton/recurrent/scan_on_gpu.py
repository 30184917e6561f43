"""States with an elementwise update, by a kernel that computes `attnc.runtime.executors.recurrent.prefixes.fill`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnc.compiler.recurrences.kernels.scan_kernel import MOST_ENTRIES, Op, ScanKind, emit_scan
from attnc.runtime.call.device_targets import target_of
from attnc.runtime.executors.triton.launch import launch

LEAST = 16
"""Minimum number of entries in a block."""


def fill(
    out: Tensor, decay: Tensor | None, write: Tensor, emptied: Tensor | None, start: Tensor, *, backwards: bool
) -> None:
    """Compute out_t = decay_t · out_{t-1} + write_t from `start`, in fp32 or complex64; see `prefixes.PrefixSteps`."""
    if not out.numel():
        return
    target_of(out.device)
    lead, entries = out.shape[:3], math.prod(out.shape[3:])
    shared = decay is not None and all(size == 1 for size in decay.shape[3:])
    block = min(MOST_ENTRIES, max(LEAST, 1 << (entries - 1).bit_length()))
    op: Op = "max" if decay is None else "complex" if out.is_complex() else "real"
    kind = ScanKind(op, shared, emptied is not None, backwards, block)
    flat_out = _flat(out, lead)
    target = flat_out if _is_flat(out) else torch.empty_like(flat_out, memory_format=torch.contiguous_format)
    tensors = {"out": target, "write": _flat(write, lead), "start": start.reshape(*start.shape[:2], -1)}
    if decay is not None:
        decays = decay.to(out.dtype).resolve_conj()
        if not shared:
            decays = decays.expand(*decays.shape[:3], *out.shape[3:])
        tensors["decay"] = _flat(decays, decays.shape[:3])
    if emptied is not None:
        tensors["emptied"] = emptied.to(torch.int32)
    if out.is_complex():
        tensors = {name: x if name == "emptied" else _pairs(x) for name, x in tensors.items()}
    numbers = {"heads": lead[1], "tokens": lead[2], "entries": entries}
    launch(emit_scan(kind), lead[0] * lead[1], tensors, numbers, -(-entries // block))
    if not _is_flat(out):
        out.copy_(target.view(out.shape))


def _is_flat(x: Tensor) -> bool:
    """Check whether the entries of a token are contiguous."""
    step = 1
    for size, stride in zip(reversed(x.shape[3:]), reversed(x.stride()[3:]), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _flat(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Return `x` as (B, H, N, entries) with contiguous entries; copied only if necessary."""
    x = x.resolve_conj()
    if _is_flat(x):
        return x.as_strided((*lead, math.prod(x.shape[3:])), (*x.stride()[:3], 1), x.storage_offset())
    return x.reshape(*lead, -1).contiguous()


def _pairs(x: Tensor) -> Tensor:
    """View complex numbers as twice as many real numbers."""
    return torch.view_as_real(x.contiguous() if x.stride(-1) != 1 else x).flatten(-2)
