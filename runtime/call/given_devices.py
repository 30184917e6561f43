"""Checks of inputs on another device than q, or wider than the dtype of the computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnc.compiler.ir import Pattern
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.fallbacks import CAST, MOVED, note


def check_devices(pattern: Pattern, inputs: Mapping[str, object], tensors: Sequence[Tensor], q: Tensor) -> None:
    """Raise ArgumentError for a real input on another device than q, which gradients would not reach.

    Integers and booleans may be on any device, and are copied; the copy is counted, and so is the rounding of a real
    input.
    """
    traced = torch.compiler.is_compiling()
    for declared, x in zip(pattern.tensors, tensors, strict=True):
        if declared.is_floating and x.device != q.device:
            raise ArgumentError(
                f"the input `{declared.name}` is on {x.device} and q on {q.device}: move it, "
                f"{declared.name}.to({str(q.device)!r})"
            )
        if traced or inputs.get(declared.name) is not x:
            continue  # a graph's tensors, or converted from a list by this call
        if x.device != q.device and not q.is_cuda:
            note(pattern.name, MOVED, f"the input `{declared.name}` is on {x.device.type}")
        if x.dtype == torch.float64 != q.dtype:
            note(pattern.name, CAST, f"the input `{declared.name}`: float64 to float32")


__all__ = ["check_devices"]
